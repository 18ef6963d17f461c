#!/bin/sh
# System packages that the tests use: a browser and a Redis. Installed as root with apt; elsewhere named, and those tests skip.
set -u
missing=""
command -v chromium >/dev/null 2>&1 || missing="$missing chromium"
command -v redis-server >/dev/null 2>&1 || command -v valkey-server >/dev/null 2>&1 || missing="$missing redis-server"
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing:$missing"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } >/tmp/recsys-apt.log 2>&1 && exit 0
    tail -3 /tmp/recsys-apt.log
fi
echo "not installed:$missing; their tests will be skipped (as root on Debian or Ubuntu: apt-get install$missing)"
[ "${CI:-}" != true ]
