// The live view: the same component in the side bar and below the graph. In: a store, words, actions. It draws once for
// a change, no more often than asked for, and not at all while nobody sees it.

import { BlocksView } from "./blocks_view.js";
import { TimeChart } from "./chart.js";
import { element, figures, section } from "./elements.js";
import { PARTS } from "./store.js";

const MOST_HAPPENINGS = 8;
const CALM_MS = 1000;

export class Panel {
  #store;
  #words;
  #preferences;
  #cursor = null;
  #drawnAt = 0;
  #timer = 0;
  #colors = null;
  #views = new Map();
  #parts = {};

  // `place` is where it is shown; `preferences.updatesPerSecond()` bounds how often it draws. `styles` are rules, which the
  // view holds itself: the rest of the page is not ours.
  constructor({ place, store, words, actions, preferences, styles }) {
    this.#store = store;
    this.#words = words;
    this.#preferences = preferences;
    this.root = this.#build(actions);
    this.root.prepend(element("style", {}, styles));
    this.root.dataset.place = place;
    store.addEventListener("change", () => this.schedule());
    new ResizeObserver(() => this.schedule()).observe(this.root);
    // Themes are changed by a class or by style rules on the body.
    const theme = new MutationObserver(() => this.#forgetColors());
    for (const node of [document.body, document.documentElement]) {
      theme.observe(node, { attributes: true, attributeFilter: ["class", "style"] });
    }
  }

  // Puts the view into `host`, which may hold what an earlier call put there.
  show(host) {
    host.replaceChildren(this.root);
    this.#forgetColors();
  }

  get isSeen() {
    return this.root.isConnected && this.root.offsetParent !== null && !document.hidden;
  }

  schedule() {
    if (this.#timer || !this.isSeen) return;
    const isCalm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    const interval = Math.max(1000 / this.#preferences.updatesPerSecond(), isCalm ? CALM_MS : 0);
    const wait = Math.max(0, this.#drawnAt + interval - performance.now());
    this.#timer = setTimeout(() => requestAnimationFrame(() => {
      this.#timer = 0;
      if (this.isSeen) this.#draw();
    }), wait);
  }

  #forgetColors() {
    this.#colors = null;
    this.schedule();
  }

  // -- building --------------------------------------------------------------------------------------------------

  #build(actions) {
    const { text } = this.#bound();
    const parts = this.#parts;
    parts.sentence = element("p", { class: "ls-sentence", role: "status" });
    parts.state = element("span", { class: "ls-state" });
    parts.answer = element("p", { class: "ls-answer", role: "status" });
    const button = (name, work) => element("button", {
      type: "button", class: "ls-button", onclick: () => this.#answer(work()), "data-action": name,
    }, text(`button.${name}`));
    parts.buttons = element("div", { class: "ls-buttons", role: "group", "aria-label": text("title") },
      (parts.free = button("free", () => actions.free())),
      button("text", () => actions.copyReport("text")),
      button("json", () => actions.copyReport("json")),
      button("csv", () => actions.exportRun()));

    const memoryCanvas = this.#canvas("memory.chart");
    const linkCanvas = this.#canvas("link.chart");
    parts.memoryChart = new TimeChart(memoryCanvas);
    parts.linkChart = new TimeChart(linkCanvas);
    parts.memoryCanvas = memoryCanvas;
    parts.legend = figures([...PARTS, "budget", "total"].map((part) => [part, text(`memory.${part}`), `--ls-${part}`]));
    parts.memoryNote = element("p", { class: "ls-note" });
    parts.link = figures([["now", text("link.now")]]);
    parts.linkNote = element("p", { class: "ls-note" });
    parts.host = figures(["slabs", "locked", "mapped", "in_file", "packed", "free", "total"].map((key) => [key, text(`host.${key}`)]));
    parts.models = element("ul", { class: "ls-list" });
    parts.events = element("ul", { class: "ls-list" });
    parts.blocks = element("div", { class: "ls-models" });
    return element("div", { class: "ls-panel" },
      element("header", { class: "ls-header" }, element("div", { class: "ls-line" }, parts.state, parts.sentence),
        parts.buttons, parts.answer),
      element("div", { class: "ls-grid" },
        section(text("section.memory"), "ls-wide", memoryCanvas, parts.legend.root, parts.memoryNote),
        element("div", { class: "ls-stack" },
          section(text("section.link"), "", linkCanvas, parts.link.root, parts.linkNote),
          section(text("section.host"), "", parts.host.root)),
        parts.blocks,
        section(text("section.models"), "", parts.models, element("h4", {}, text("models.events")), parts.events)));
  }

  #bound() {
    return { text: (...key) => this.#words.text(...key), size: (bytes) => this.#words.size(bytes) };
  }

  #canvas(label) {
    const canvas = element("canvas", {
      class: "ls-chart", role: "img", tabindex: 0, "aria-label": this.#words.text(label),
    });
    const chart = () => (canvas === this.#parts.memoryCanvas ? this.#parts.memoryChart : this.#parts.linkChart);
    canvas.addEventListener("pointermove", (event) => this.#point(chart().at(event.offsetX)));
    canvas.addEventListener("pointerleave", () => this.#point(null));
    canvas.addEventListener("blur", () => this.#point(null));
    canvas.addEventListener("keydown", (event) => {
      const last = this.#store.length - 1;
      const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -40, PageDown: 40, Home: -Infinity, End: Infinity }[event.key];
      if (step === undefined || last < 0) return;
      event.preventDefault();
      this.#point(Math.max(0, Math.min(last, (this.#cursor ?? last) + step)));
    });
    return canvas;
  }

  #point(index) {
    if (index === this.#cursor) return;
    this.#cursor = index;
    this.#drawnAt = 0; // what a person points at is shown at once
    this.schedule();
  }

  async #answer(promise) {
    const { answer } = this.#parts;
    try {
      answer.textContent = await promise;
      answer.classList.remove("ls-alarm");
    } catch (error) {
      answer.textContent = this.#words.text("done.failed", { reason: error.message });
      answer.classList.add("ls-alarm");
    }
  }

  // -- drawing ---------------------------------------------------------------------------------------------------

  #draw() {
    const begun = performance.now();
    this.#colors ??= readColors(this.root);
    const store = this.#store;
    if (this.#cursor !== null && this.#cursor >= store.length) this.#cursor = null;
    // All sizes are read before anything is written, or the page would be laid out anew for each.
    this.#parts.memoryChart.measure();
    this.#parts.linkChart.measure();
    for (const view of this.#views.values()) view.strip.measure();
    this.#drawHeader();
    this.#drawMemory();
    this.#drawLink();
    this.#drawBlocks();
    this.#drawModels();
    this.#drawHost();
    this.#drawnAt = performance.now();
    this.root.dataset.drawMs = (this.#drawnAt - begun).toFixed(2);
    this.root.dataset.draws = String(1 + Number(this.root.dataset.draws ?? 0));
  }

  #drawHeader() {
    const { text } = this.#bound();
    const store = this.#store;
    const state = store.isConnected ? (store.isRunning ? "running" : "idle") : "away";
    put(this.#parts.state, text(`state.${state}`));
    this.#parts.state.dataset.state = state;
    const [name, inIt] = store.advice;
    put(this.#parts.sentence, text(`advice.${name === "left" && state === "running" ? "coming" : name}`, inIt));
    this.#parts.free.disabled = state !== "idle" || !store.models().some((model) => model.loaded);
  }

  #drawMemory() {
    const { text, size } = this.#bound();
    const { legend, memoryChart, memoryNote } = this.#parts;
    const store = this.#store;
    const card = store.now?.card;
    const [times, total, budget] = ["time_s", "total_bytes", "budget_bytes"].map((name) => store.column(name));
    const columns = PARTS.map((part) => store.column(`${part}_bytes`));
    const [resident, ring] = columns;
    const isOver = (index) => resident[index] + ring[index] > budget[index];
    memoryChart.draw({
      times,
      layers: columns.map((values, place) => ({ values, color: this.#colors[PARTS[place]] })),
      most: card?.total_bytes || total[total.length - 1] || 0,
      references: [{ values: budget, color: this.#colors.budget, dash: [4, 3] }],
      breaches: isOver,
      cursor: this.#cursor,
      labels: { top: card ? size(card.total_bytes) : "", ...this.#timeLabels() },
      colors: this.#colors,
    });
    const at = this.#cursor;
    PARTS.forEach((part, place) => legend.put(part, size(at === null ? card?.[`${part}_bytes`] : columns[place][at])));
    const nowBudget = at === null ? card?.budget_bytes : budget[at];
    legend.put("budget", size(nowBudget));
    legend.put("total", size(at === null ? card?.total_bytes : total[at]));
    const over = at === null ? card && card.resident_bytes + card.ring_bytes - nowBudget : resident[at] + ring[at] - nowBudget;
    put(memoryNote, !store.now || card ? (nowBudget && over > 0 ? text("memory.over", { size: size(over) }) : "") : text("memory.none"));
    memoryNote.classList.toggle("ls-alarm", over > 0);
  }

  #timeLabels() {
    const store = this.#store;
    const times = store.column("time_s");
    if (!times.length) return { left: "", right: "" };
    const clock = (time) => this.#words.clock(time);
    const last = times[times.length - 1];
    const begin = last - Math.max(30, last - times[0]);
    return { left: clock(begin), right: clock(this.#cursor === null ? last : times[this.#cursor]) };
  }

  #drawLink() {
    const { text } = this.#bound();
    const { link, linkChart, linkNote } = this.#parts;
    const rates = this.#store.column("link_rate");
    const timed = this.#store.models().filter((model) => model.has_clock);
    const measured = Math.max(0, ...timed.map((model) => model.link_bytes_per_s ?? 0));
    const most = rates.reduce((most, rate) => (rate > most ? rate : most), measured) * 1.25; // room for a label
    linkChart.draw({
      times: this.#store.column("time_s"),
      layers: [{ values: rates, color: this.#colors.ring }],
      isStacked: false,
      most,
      references: measured ? [{ value: measured, color: this.#colors.quiet, dash: [4, 3] }] : [],
      cursor: this.#cursor,
      labels: { top: most ? this.#words.rate(most) : "", ...this.#timeLabels() },
      colors: this.#colors,
    });
    const index = this.#cursor ?? rates.length - 1;
    link.put("now", this.#words.rate(this.#cursor === null && !this.#store.isRunning ? 0 : rates[index]));
    put(linkNote, measured ? text("link.measured", { rate: this.#words.rate(measured) }) : "");
  }

  #drawBlocks() {
    const models = this.#store.models();
    for (const [id, view] of this.#views) {
      if (!models.some((model) => model.id === id)) {
        view.root.remove();
        this.#views.delete(id);
      }
    }
    for (const model of models) {
      if (!this.#views.has(model.id)) {
        const view = new BlocksView(this.#words, () => {
          this.#drawnAt = 0;
          this.schedule();
        });
        this.#views.set(model.id, view);
        this.#parts.blocks.append(view.root);
        view.strip.measure();
      }
      this.#views.get(model.id).draw(model, this.#store.secondsPerPass(model.id), this.#colors);
    }
  }

  #drawModels() {
    const { text, size } = this.#bound();
    const models = (this.#store.now?.models ?? []).map((model) => {
      const where = text("models.on", { size: size(model.loaded_bytes), total: size(model.total_bytes), device: model.device });
      return `${model.name}: ${where}${model.streams ? `, ${text("models.streams")}` : ""}`;
    });
    const moved = this.#store.models().flatMap(({ model, moves }) => {
      const came = moves?.returns.count ? moves.returns : moves?.first;
      const tell = (tally, path) => (tally?.count ? [text(path, {
        model, size: size(tally.last_bytes), seconds: this.#words.seconds(tally.last_seconds),
      })] : []);
      return [...tell(came, "models.brought"), ...tell(moves?.departures, "models.sent")];
    });
    items(this.#parts.models, models.length ? [...models, ...moved] : [text("models.none")]);
    items(this.#parts.events, this.#store.happened.slice(-MOST_HAPPENINGS).reverse().map((event) => {
      const what = event.change_bytes > 0 ? "models.came" : "models.left";
      return `${this.#words.clock(event.time_s)} ${text(what, { model: event.model, size: size(Math.abs(event.change_bytes)) })}`;
    }));
  }

  #drawHost() {
    const { size } = this.#bound();
    const { host } = this.#parts;
    const now = this.#store.now?.host;
    const models = this.#store.models();
    const packed = models.find((model) => model.is_packed && model.streamed_bytes_per_step);
    host.put("slabs", size(now?.slab_bytes));
    host.put("locked", size(now?.page_locked_bytes));
    const sum = (key) => size(models.reduce((total, model) => total + (model[key] ?? 0), 0));
    host.put("mapped", sum("mapped_bytes"));
    host.put("in_file", sum("in_file_bytes_per_step"));
    host.put("packed", packed ? `${this.#words.number((100 * packed.link_bytes_per_step) / packed.streamed_bytes_per_step, 1)} %` : "–");
    host.put("free", size(now?.ram_free_bytes));
    host.put("total", size(now?.ram_total_bytes));
  }
}

// Writes only what changed, so that a screen reader is not told the same again.
function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function items(list, texts) {
  while (list.children.length > texts.length) list.lastElementChild.remove();
  texts.forEach((text, index) => {
    if (!list.children[index]) list.append(document.createElement("li"));
    put(list.children[index], text);
  });
}

function readColors(root) {
  const style = getComputedStyle(root);
  // Palettes are a person's own: whether one is dark shows in the colour of its text alone.
  const [red, green, blue] = style.color.match(/[\d.]+/g).map(Number);
  root.dataset.theme = 0.3 * red + 0.6 * green + 0.1 * blue > 128 ? "dark" : "light";
  const names = [...PARTS, "budget", "alarm", "quiet", "text", "border", "r", "p", "s", "z", "f", "c", "wait"];
  const colors = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--ls-${name}`).trim()]));
  return { ...colors, font: style.fontFamily };
}
