// plot.js - milliseconds per token against the position in the session, as the tokens come.
//
// A point is the mean of at least BIN tokens and MIN_MS: the server puts the tokens of one wake-up
// into one event, and networks put events together, so that the time between two of them says little.

const BIN = 8, MIN_MS = 10, MAX_POINTS = 400;
const NS = "http://www.w3.org/2000/svg";

function shape(name, attributes, text) {
  const e = document.createElementNS(NS, name);
  for (const key in attributes) e.setAttribute(key, attributes[key]);
  if (text !== undefined) e.textContent = text;
  return e;
}

export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length ? sorted[sorted.length >> 1] : NaN;
}

export const milliseconds = (x) => `${x >= 100 ? x.toFixed(0) : x >= 10 ? x.toFixed(1) : x.toFixed(2)} ms`;

/** A round number, not below x. */
function rounded(x) {
  const power = 10 ** Math.floor(Math.log10(x));
  return [1, 1.5, 2, 3, 4, 6, 8, 10].find((m) => m * power >= x) * power;
}

/** Turns the arrival of tokens into points. */
export class Stopwatch {
  #at = 0;
  #n = 0;

  /** point(position, ms) is called every now and then. The first tokens are the prompt's time. */
  constructor(point) {
    this.point = point;
  }

  note(n_tokens, position, now) {
    if (!this.#at) {
      this.#at = now;
      return;
    }
    this.#n += n_tokens;
    if (this.#n < BIN || now - this.#at < MIN_MS) return;
    this.point(position, (now - this.#at) / this.#n);
    this.#at = now;
    this.#n = 0;
  }

  /** A pause that was not the server's: begin anew. */
  skip() {
    this.#at = 0;
    this.#n = 0;
  }
}

export class Plot {
  #points = [];
  #due = false;

  constructor(svg, now) {
    this.svg = svg;
    this.now = now;
    new ResizeObserver(() => this.draw()).observe(svg);
  }

  /** Show another session's points, which stay the caller's. */
  show(points) {
    this.#points = points;
    this.draw();
    this.describe();
  }

  add(position, ms) {
    this.#points.push({ position, ms });
    if (this.#points.length > MAX_POINTS) // every second one of all keeps the whole range
      this.#points.splice(0, this.#points.length, ...this.#points.filter((_, i) => i % 2 === 0));
    if (this.#due) return;
    this.#due = true;
    requestAnimationFrame(() => { this.#due = false; this.draw(); });
  }

  /** For those who do not see it; not at each point, which would never be quiet. */
  describe() {
    const p = this.#points;
    if (!p.length) {
      this.svg.setAttribute("aria-label", "No tokens were timed yet.");
      return;
    }
    const half = p.length >> 1, early = median(p.slice(0, half || 1).map((x) => x.ms)), late = median(p.slice(half).map((x) => x.ms));
    this.svg.setAttribute("aria-label", `Time per token from position ${p[0].position} to ${p.at(-1).position}: ` +
      `median ${milliseconds(early)} in the first half, ${milliseconds(late)} in the second.`);
  }

  draw() {
    const p = this.#points, width = this.svg.clientWidth || 300, height = this.svg.clientHeight || 116;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.now.textContent = p.length ? milliseconds(median(p.slice(-8).map((x) => x.ms))) : "";
    const left = 2, right = width - 2, top = 12, bottom = height - 16;
    const parts = [shape("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom })];
    if (p.length) {
      const middle = median(p.map((x) => x.ms)), limit = rounded(Math.max(middle * 2, 0.02));
      const last = Math.max(...p.map((x) => x.position), 1);
      const x = (v) => left + (v / last) * (right - left), y = (v) => bottom - (Math.min(v, limit) / limit) * (bottom - top);
      const ordered = [...p].sort((a, b) => a.position - b.position);
      parts.push(shape("line", { class: "axis", x1: left, x2: right, y1: top, y2: top }),
        shape("line", { class: "median", x1: left, x2: right, y1: y(middle), y2: y(middle) }),
        shape("polyline", { class: "line", points: ordered.map((q) => `${x(q.position).toFixed(1)},${y(q.ms).toFixed(1)}`).join(" ") }));
      for (const q of ordered)
        parts.push(shape("circle", { class: q.ms > limit ? "over" : "dot", cx: x(q.position).toFixed(1), cy: y(q.ms).toFixed(1), r: ordered.length > 80 ? 1.4 : 2.2 }));
      parts.push(shape("text", { x: left, y: top - 3 }, `${Number(limit.toPrecision(2))} ms`), shape("text", { x: right, y: height - 4, "text-anchor": "end" }, last.toLocaleString("en")));
    }
    parts.push(shape("text", { x: left, y: height - 4 }, "0"));
    this.svg.replaceChildren(...parts);
  }
}
