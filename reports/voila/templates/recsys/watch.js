// The open page asks its kernel for every reading: a page that nobody looks at costs nothing, and a slow reading is waited for, not asked for again.
// Where no reading comes, the server is gone: the page says that its numbers are old, and loads itself again once the server answers.
(() => {
  document.title = "Recommendations · operations";
  let seen = "", since = Date.now(), asked = -Infinity, tried = 0;
  setInterval(async () => {
    const notice = document.querySelector("[data-updated]"), button = document.querySelector("button.rs-refresh"), now = Date.now();
    if (!notice || !button || document.hidden) { since = now; return; }
    const every = 1000 * Number(notice.dataset.refresh);
    if (notice.dataset.updated !== seen) {
      seen = notice.dataset.updated;
      since = now;
      document.getElementById("rs-stale")?.remove();
    }
    if (asked <= since && now - asked >= every) { asked = now; button.click(); }
    const old = now - since, away = 3 * every + 10000;
    if (old < away) return;
    const bar = document.getElementById("rs-stale") ?? document.body.appendChild(Object.assign(document.createElement("div"), { id: "rs-stale" }));
    bar.textContent = `No update for ${Math.round(old / 1000)} s: the dashboard's server does not answer. The numbers below are old.`;
    if (now - tried < 10000) return;
    tried = now;
    try { if ((await fetch(`${document.body.dataset.baseUrl}static/voila.js`, { method: "HEAD", cache: "no-store" })).ok && old > 2 * away) location.reload(); }
    catch { /* still away: the bar stays */ }
  }, 250);
})();
