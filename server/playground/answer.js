// answer.js - the text of an answer, token by token, and what else the model might have said.

const probe = document.getElementById("probe");
const status = document.getElementById("status");

/** The tokens of a chunk as {bytes, p, top: [{text, p}]}; null where the request had no logprobs. */
export function tokensOf(choice) {
  const l = choice.logprobs;
  if (!l) return null;
  if (l.content)
    return l.content.map((t) => ({
      bytes: new Uint8Array(t.bytes),
      p: Math.exp(t.logprob),
      top: t.top_logprobs.map((o) => ({ text: o.token, p: Math.exp(o.logprob) })),
    }));
  const last = l.tokens.length - 1;
  const stopped = choice.finish_reason === "stop" && last >= 0 && !choice.text.endsWith(l.tokens[last]);
  // The stop token is listed, but is no part of the text.
  return (stopped ? l.tokens.slice(0, -1) : l.tokens).map((text, i) => ({
    bytes: bytesOf(text),
    p: Math.exp(l.token_logprobs[i]),
    top: Object.entries(l.top_logprobs?.[i] ?? {}).map(([t, p]) => ({ text: t, p: Math.exp(p) })),
  }));
}

/** A completion shows a token that is no text by itself as bytes:\xe2\x82. */
function bytesOf(text) {
  if (/^bytes:(\\x[0-9a-f]{2})+$/.test(text))
    return Uint8Array.from(text.slice(6).match(/[0-9a-f]{2}/g), (h) => parseInt(h, 16));
  return new TextEncoder().encode(text);
}

const percent = (p) => (p >= 0.1 ? `${Math.round(p * 100)} %` : p >= 0.001 ? `${(p * 100).toFixed(1)} %` : "< 0.1 %");
const visible = (text) => JSON.stringify(text).slice(1, -1).replaceAll('\\"', '"').replaceAll(" ", "·") || "(nothing)";
const level = (p) => (p > 0.8 ? 0 : p > 0.5 ? 1 : p > 0.25 ? 2 : p > 0.08 ? 3 : 4);

export class Answer {
  #decoder = new TextDecoder();
  #shown = "";
  #pending = []; // tokens whose bytes are no whole character yet
  #here = -1;
  text = "";
  tokens = []; // of each element of the text, {text, p, top}

  /** element: an empty one, which is filled. */
  constructor(element) {
    this.element = element;
    element.addEventListener("keydown", (e) => this.#onKey(e));
    element.addEventListener("pointerover", (e) => this.#onPointer(e));
    element.addEventListener("pointerleave", () => this.#leave());
    element.addEventListener("blur", () => this.#leave());
  }

  add(text, tokens) {
    this.text += text;
    if (!tokens) {
      if (text) this.element.append(text);
      this.#shown += text;
      return;
    }
    for (const token of tokens) {
      const piece = this.#decoder.decode(token.bytes, { stream: true });
      this.#pending.push(token);
      if (!piece) continue;
      this.#append(piece);
    }
  }

  #append(piece) {
    const last = this.#pending.at(-1), p = this.#pending.reduce((product, t) => product * t.p, 1);
    this.#pending = [];
    this.#shown += piece;
    const span = document.createElement("span");
    span.className = `tok p${level(p)}`;
    span.dataset.i = this.tokens.length;
    span.textContent = piece;
    this.tokens.push({ text: piece, p, top: last.top });
    this.element.append(span);
  }

  /** The text is complete. The tokens must say the same; where they do not (a stop string cut one)
   *  the text is right. */
  finish() {
    if (this.#shown !== this.text) {
      this.element.textContent = this.text;
      this.tokens = [];
    }
    if (!this.tokens.length) return;
    this.element.tabIndex = 0;
    this.element.setAttribute("role", "group");
    this.element.setAttribute("aria-label", `Answer of ${this.tokens.length} tokens; the arrow keys walk through their probabilities`);
  }

  /** Text and tokens of an answer that was shown before. */
  restore(text, tokens) {
    this.text = this.#shown = text;
    if (!tokens?.length) {
      this.element.textContent = text;
      return;
    }
    this.#shown = "";
    for (const t of tokens) {
      this.#pending = [t];
      this.#append(t.text);
    }
    this.finish();
  }

  #onPointer(e) {
    const span = e.target.closest(".tok");
    if (span) this.#show(Number(span.dataset.i));
    else this.#leave();
  }

  #onKey(e) {
    const last = this.tokens.length - 1;
    const to = { ArrowRight: this.#here + 1, ArrowLeft: this.#here < 0 ? last : this.#here - 1, Home: 0, End: last }[e.key];
    if (e.key === "Escape" && this.#here >= 0) {
      e.stopPropagation(); // closes what is open, and stops nothing
      this.#leave();
    } else if (to !== undefined && last >= 0 && !e.ctrlKey && !e.altKey && !e.metaKey) {
      e.preventDefault();
      this.#show(Math.max(0, Math.min(last, to)));
      const t = this.tokens[this.#here];
      status.textContent = `${visible(t.text).replaceAll("·", " ")}: ${percent(t.p)}. ` +
        t.top.map((o) => `${o.text} ${percent(o.p)}`).join(", ");
    }
  }

  #span(i) {
    return this.element.querySelector(`[data-i="${i}"]`);
  }

  #leave() {
    if (this.#here >= 0) this.#span(this.#here)?.classList.remove("here");
    this.#here = -1;
    probe.hidden = true;
  }

  #show(i) {
    this.#leave();
    this.#here = i;
    const span = this.#span(i), token = this.tokens[i];
    span.classList.add("here");
    span.scrollIntoView({ block: "nearest" });
    const others = token.top.filter((o) => o.text !== token.text && Math.abs(o.p - token.p) > 1e-9).slice(0, 5);
    const rows = [{ ...token, chosen: true }, ...others].sort((a, b) => b.p - a.p).map(row);
    probe.replaceChildren(...rows);
    probe.hidden = false;
    const at = span.getClientRects()[0], box = probe.getBoundingClientRect();
    const below = at.bottom + 8 + box.height < innerHeight;
    probe.style.left = `${Math.max(8, Math.min(at.left, innerWidth - box.width - 8))}px`;
    probe.style.top = `${below ? at.bottom + 8 : Math.max(8, at.top - box.height - 8)}px`;
  }
}

function row({ text, p, chosen }) {
  const e = document.createElement("div"), code = document.createElement("code"),
    number = document.createElement("span"), bar = document.createElement("i");
  e.className = chosen ? "row chosen" : "row";
  code.textContent = visible(text);
  number.textContent = percent(p);
  bar.style.width = `${Math.min(p, 1) * 100}%`;
  e.append(code, number, bar);
  return e;
}
