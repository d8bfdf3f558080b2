// problems.js - what went wrong, in words, and what can be done about it.

import { ApiError, LostError } from "./api.js";
import { refresh, startAnew } from "./branches.js";
import { mark } from "./sampling.js";
import { button } from "./turns.js";
import { $, plot, showBusy, state } from "./view.js";

export function clearBanner() {
  $("banner").hidden = true;
  $("banner").replaceChildren();
}

export function showBanner(title, text, actions = []) {
  const strong = document.createElement("strong"), p = document.createElement("p");
  strong.textContent = title;
  p.textContent = text;
  const parts = [strong, p];
  if (actions.length) {
    const row = document.createElement("div");
    row.className = "actions";
    row.append(...actions);
    parts.push(row);
  }
  $("banner").replaceChildren(...parts);
  $("banner").hidden = false;
}

const retryButton = (retry) => button("Try again", () => { clearBanner(); retry(); }, { className: "", id: "retry" });

function askForKey(message) {
  toggleKey(true);
  showBanner("An API key is needed", `${message} Enter a key above.`);
  $("key").focus();
}

/** 429: say how long to wait, and let the button wait, too. */
function showTooMany(e, retry) {
  const again = retryButton(retry), seconds = e.retryAfter ?? 1;
  again.disabled = true;
  setTimeout(() => { again.disabled = false; }, seconds * 1000);
  showBanner("The server is busy", `${e.message} It asks to wait ${seconds} s.`, [again]);
}

function showWrongField(e) {
  const input = mark(e.param, e.message);
  showBanner(`Not accepted: ${e.param}`, e.message);
  if (!input) return;
  if (!input.checkVisibility()) togglePanel(true);
  input.focus();
}

export const newest = () => button("Load the newest", () => act(refresh), { className: "", id: "newest" });

/** Say what went wrong and what can be done. retry: does it once more. */
export function explain(e, retry) {
  if (!(e instanceof ApiError)) {
    if (e.param) showWrongField(e);
    else showBanner("This did not work", e.message);
    if (!e.param && !(e instanceof LostError)) console.error(e);
    return;
  }
  if (e.status === 401) askForKey(e.message);
  else if (e.status === 429) showTooMany(e, retry);
  else if (e.status === 412) showBanner("The session has moved on", `${e.message} Another tab or client has used it. Nothing was changed.`, [newest()]);
  else if (e.status === 409 && e.retryAfter) showBanner("The session is in use", e.message, [retryButton(retry), newest()]);
  else if (e.code === "session_not_found" && e.param !== "snapshot")
    showBanner("This session is gone", `${e.message} It was deleted or not used for long; its states are gone, too.`,
      [button("New session", () => act(startAnew), { className: "", id: "gone-new" })]);
  else if (e.status === 0) showBanner("No connection", e.message, [retryButton(retry)]);
  else if (e.status === 503) showBanner("The server does not take requests just now", e.message, [retryButton(retry)]);
  else if (e.param) showWrongField(e);
  else showBanner(`The server answered ${e.status}`, e.message);
}

/** One thing at a time. */
export async function act(what) {
  if (state.busy) return;
  clearBanner();
  state.busy = true;
  showBusy();
  try {
    await what();
  } catch (e) {
    explain(e, () => act(what));
  } finally {
    state.busy = false;
    showBusy();
  }
}

export function toggleKey(open = $("key-form").hidden) {
  $("key-form").hidden = !open;
  $("key-toggle").setAttribute("aria-expanded", String(open));
  if (open) $("key").focus();
}

export function togglePanel(open = !document.body.classList.contains("panel-open")) {
  document.body.classList.toggle("panel-open", open);
  $("panel-toggle").setAttribute("aria-expanded", String(open));
  $("panel-toggle").textContent = open ? "Conversation" : "Session";
  if (open) $("panel").focus();
  plot.draw();
}
