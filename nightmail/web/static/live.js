// Replaces <main> by its newest version every few seconds; scroll position, focus and selection are left alone.
// Without this script the page is refreshed as a whole (see live() in parts.html.j2).
"use strict";
const seconds = Number(document.currentScript.dataset.seconds) || 5;

async function renew() {
  const main = document.getElementById("main");
  const isBusy = document.hidden || main.contains(document.activeElement) || String(getSelection());
  if (!isBusy) {
    const reply = await fetch(location.href, { credentials: "same-origin", redirect: "error" });
    if (reply.ok) {
      const page = new DOMParser().parseFromString(await reply.text(), "text/html");
      main.replaceChildren(...page.getElementById("main").childNodes);
      document.querySelector("footer").replaceChildren(...page.querySelector("footer").childNodes);
    }
  }
}

async function live() {
  try {
    await renew();
  } catch {
    // The server is away or the session has ended: the next try, or the next click, will tell.
  }
  setTimeout(live, seconds * 1000);
}

setTimeout(live, seconds * 1000);
