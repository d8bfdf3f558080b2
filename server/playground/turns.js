// turns.js - how turns look in the conversation. A turn is
//   {kind: "chat" | "completion", system, prompt, text, tokens, finish, start, end, n, ms, state}
// with state running, done, stopped or failed; or {state: "gap", from, to, unsure}: tokens that the
// session got elsewhere, whose text is not here.

import { Answer } from "./answer.js";
import { milliseconds } from "./plot.js";

const ENDINGS = { stop: "ended by itself", length: "cut at max tokens" };

function element(name, className, text) {
  const e = document.createElement(name);
  if (className) e.className = className;
  if (text !== undefined) e.textContent = text;
  return e;
}

export function button(label, action, { className = "quiet", id } = {}) {
  const e = element("button", className, label);
  e.type = "button";
  if (id) e.id = id;
  e.addEventListener("click", action);
  return e;
}

function gap({ from, to, unsure }) {
  return element("p", "gap", unsure
    ? `The session was changed elsewhere and is at position ${to.toLocaleString("en")}: not all of the text above need be a part of it.`
    : `${(to - from).toLocaleString("en")} tokens whose text is not in this tab: the server keeps the state, not the words.`);
}

function facts(turn) {
  if (turn.state === "stopped") return "Stopped and not applied: the session is where it was.";
  if (turn.state === "failed") return "Not applied: the session is where it was.";
  if (turn.state !== "done") return "";
  const parts = [`${turn.n} tokens`];
  if (turn.ms) parts.push(`${milliseconds(turn.ms)} each`);
  parts.push(ENDINGS[turn.finish] ?? turn.finish);
  return parts.filter(Boolean).join(", ");
}

/** A turn's element; .answer is the Answer of one that runs. actions: buttons for below it. */
export function turnElement(turn, model, actions) {
  if (turn.state === "gap") return gap(turn);
  const e = element("article", `turn ${turn.kind}`);
  e.classList.toggle("running", turn.state === "running");
  e.classList.toggle("unapplied", turn.state === "stopped" || turn.state === "failed");
  e.setAttribute("aria-label", turn.kind === "chat" ? "Turn" : "Completion");
  if (turn.kind === "chat") {
    if (turn.system) e.append(element("p", "who", "System"), element("div", "said", turn.system));
    e.append(element("p", "who", "You"), element("div", "said", turn.prompt), element("p", "who", model));
  } else {
    e.append(element("span", "said", turn.prompt));
  }
  const text = element(turn.kind === "chat" ? "div" : "span", "answer");
  const answer = new Answer(text);
  e.append(text);
  if (turn.state !== "running" || turn.text) answer.restore(turn.text, turn.tokens);
  const foot = element("div", "foot");
  foot.append(element("span", "facts-line", facts(turn)), ...actions);
  if (turn.state !== "running") e.append(foot);
  e.answer = answer;
  return e;
}

export function emptyElement(mode) {
  const e = element("div", "empty");
  e.append(element("h2", "", "What shall it be?"),
    element("p", "", mode === "chat"
      ? "Write a message below. The session keeps its state on the server, of one size at any age: each turn costs what is new."
      : "Write a beginning below and the model goes on. The session keeps its state on the server, of one size at any age."));
  return e;
}
