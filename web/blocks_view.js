// One streamed model: its blocks as a strip, what a pass takes and what it was predicted to take.

import { element, figures, section } from "./elements.js";
import { BlockStrip } from "./strip.js";

const LETTER_OF = { resident: "r", resident_packed: "p", streamed: "s", streamed_packed: "z" };
const KEYS = ["resident", "streamed", "crossing", "ring", "passes", "served", "late", "departures", "rate"];
const TIMED = ["timed", "compute", "wait", "copy", "restore", "predicted", "floor"];

export class BlocksView {
  #words;
  #redraw;
  #selected = null;
  #count = 0;

  // `redraw()` is asked for when a person points at another block.
  constructor(words, redraw) {
    this.#words = words;
    this.#redraw = redraw;
    const text = (key) => words.text(key);
    this.title = element("h4");
    this.canvas = element("canvas", { class: "ls-strip", role: "img", tabindex: 0 });
    this.strip = new BlockStrip(this.canvas);
    this.legend = element("ul", { class: "ls-legend" }, ...["r", "p", "s", "z", "f", "c"].map((letter) =>
      element("li", {}, element("span", { class: "ls-swatch", style: `--swatch: var(--ls-${letter})`, "aria-hidden": "true" }),
        text(`block.${letter}`))));
    this.detail = element("p", { class: "ls-note ls-detail", role: "status" });
    this.figures = figures(KEYS.map((key) => [key, text(`figure.${key}`)]));
    this.split = element("div", { class: "ls-split", "aria-hidden": "true" },
      element("span", { style: "--swatch: var(--ls-c)" }), element("span", { style: "--swatch: var(--ls-wait)" }));
    this.times = figures(TIMED.map((key) => [key, text(`figure.${key}`), { compute: "--ls-c", wait: "--ls-wait" }[key]]));
    this.root = element("div", { class: "ls-model" },
      section(text("section.blocks"), "", this.title, this.canvas, this.detail, this.legend),
      section(text("section.pass"), "", this.figures.root, this.split, this.times.root));
    this.canvas.addEventListener("pointermove", (event) => this.#select(this.strip.at(event.offsetX, event.offsetY)));
    this.canvas.addEventListener("pointerleave", () => this.#select(null));
    this.canvas.addEventListener("keydown", (event) => this.#move(event));
  }

  // `model` is what the store has of it, `secondsPerPass` what its passes take, null if unknown.
  draw(model, secondsPerPass, colors) {
    const units = model.units ?? [];
    const base = units.map((unit) => LETTER_OF[unit.form] ?? "");
    const letters = model.blocks.length === units.length ? [...model.blocks] : base;
    const times = new Map((model.times_ms ?? []).map((block) => [block.block, block]));
    const slowest = this.#slowest(units, times);
    this.#count = units.length;
    this.title.textContent = `${model.model}${model.family ? ` (${model.family}, ${model.backend})` : ""}`;
    this.canvas.setAttribute("aria-label", this.#words.text("block.chart", { count: units.length }));
    this.strip.draw({ letters, base, selected: this.#selected, slowest, colors });
    const detail = this.#describe(units, letters, times, slowest);
    if (this.detail.textContent !== detail) this.detail.textContent = detail;
    this.#putFigures(model, secondsPerPass);
    this.#putTimes(model);
  }

  #putFigures(model, secondsPerPass) {
    const { size, number } = { size: (bytes) => this.#words.size(bytes), number: (value) => this.#words.number(value) };
    const put = (key, text) => this.figures.put(key, text);
    put("resident", size(model.resident_bytes));
    put("streamed", size(model.streamed_bytes_per_step));
    put("crossing", size(model.link_bytes_per_step));
    put("ring", size(model.ring_bytes));
    put("passes", number(model.passes));
    put("served", number(model.hits));
    put("late", number(model.misses));
    put("departures", number(model.departures));
    put("rate", secondsPerPass === null ? "–" : this.#words.seconds(secondsPerPass));
  }

  #putTimes(model) {
    const put = (key, value) => this.times.put(key, this.#words.milliseconds(value));
    const isTimed = model.step_ms !== null && model.step_ms !== undefined;
    put("timed", model.step_ms);
    for (const key of ["compute", "wait", "copy", "restore"]) put(key, isTimed ? model[`${key}_ms`] : null);
    put("predicted", model.predicted_step_ms);
    const limit = model.limit ? ` (${this.#words.text(`figure.${model.limit === "link" ? "link" : "card"}`)})` : "";
    this.times.put("floor", `${this.#words.milliseconds(model.floor_ms)}${limit}`);
    this.split.hidden = !isTimed;
    const [compute, wait] = this.split.children;
    compute.style.flexGrow = isTimed ? model.compute_ms : 0;
    wait.style.flexGrow = isTimed ? model.wait_ms : 0;
  }

  #slowest(units, times) {
    let [slowest, most] = [null, 0];
    units.forEach((unit, index) => {
      const block = times.get(unit.name);
      if (block && block.compute + block.wait > most) [slowest, most] = [index, block.compute + block.wait];
    });
    return slowest;
  }

  #describe(units, letters, times, slowest) {
    const words = this.#words;
    const unit = units[this.#selected];
    if (unit) {
      const form = words.text(`block.${letters[this.#selected]}`);
      const block = times.get(unit.name);
      const digits = (value) => words.number(value, 2);
      const took = block && words.text("block.times", {
        compute: digits(block.compute), wait: digits(block.wait), copy: digits(block.copy),
      });
      return [words.text("block.detail", { name: unit.name, size: words.size(unit.bytes), form }), took].filter(Boolean).join("; ");
    }
    const block = slowest === null ? null : times.get(units[slowest].name);
    if (!block) return words.text("block.hint");
    return words.text("block.slowest", { name: block.block, time: words.number(block.compute + block.wait, 2) });
  }

  #move(event) {
    const row = this.strip.perRow;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -row, ArrowDown: row, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") this.#select(null);
    if (step === undefined || !this.#count) return;
    event.preventDefault();
    this.#select(Math.max(0, Math.min(this.#count - 1, (this.#selected ?? -1) + step)));
  }

  #select(index) {
    if (index === this.#selected) return;
    this.#selected = index;
    this.#redraw();
  }
}
