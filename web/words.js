// Sentences in the person's language, and figures with their units. Out of the pack's locales, which ComfyUI serves.

const DEFAULT = "en";
const UNITS = {
  GiB: { size: 1024 ** 3, name: "GiB" },
  GB: { size: 1000 ** 3, name: "GB" },
};

export class Words {
  #texts = {};
  #fallback = {};
  #language = DEFAULT;
  #formats = new Map();

  // `unit()` says in which unit bytes are told, "GiB" or "GB".
  constructor(unit) {
    this.unit = unit;
  }

  // Takes what ComfyUI's `/i18n` gives and the language that is set there.
  use(translations, language) {
    const of = (name) => translations[name]?.layerstream;
    this.#fallback = of(DEFAULT) ?? {};
    this.#language = [language, language.split("-")[0]].find(of) ?? DEFAULT;
    this.#texts = of(this.#language) ?? {};
    this.#formats.clear();
  }

  get language() {
    return this.#language;
  }

  // The text at `path` ("button.free"), with `figures` in the places that it names.
  text(path, figures = {}) {
    const look = (texts) => path.split(".").reduce((part, key) => part?.[key], texts);
    const found = look(this.#texts) ?? look(this.#fallback) ?? path;
    return found.replace(/\{(\w+)\}/g, (place, name) => {
      const figure = figures[name];
      return typeof figure === "number" ? this.number(figure, 2) : String(figure ?? place);
    });
  }

  number(value, digits = 0) {
    return this.#format(digits, () => new Intl.NumberFormat(this.#language, { maximumFractionDigits: digits }), value);
  }

  size(bytes) {
    if (bytes === null || bytes === undefined || Number.isNaN(bytes)) return "–";
    const { size, name } = UNITS[this.unit()] ?? UNITS.GiB;
    const options = { minimumFractionDigits: 2, maximumFractionDigits: 2 };
    return `${this.#format("size", () => new Intl.NumberFormat(this.#language, options), bytes / size)} ${name}`;
  }

  rate(bytesPerSecond) {
    return Number.isFinite(bytesPerSecond) ? `${this.size(bytesPerSecond)}/s` : "–";
  }

  milliseconds(value) {
    if (value === null || value === undefined) return "–";
    return `${this.number(value, value < 100 ? 1 : 0)} ms`;
  }

  seconds(value) {
    const options = { maximumSignificantDigits: 3 };
    return this.#format("seconds", () => new Intl.NumberFormat(this.#language, options), value);
  }

  // The time of day of a moment given in seconds.
  clock(time) {
    const options = { timeStyle: "medium" };
    return this.#format("clock", () => new Intl.DateTimeFormat(this.#language, options), time * 1000);
  }

  // Making a format takes longer than all that is drawn with it, so each is made once.
  #format(name, make, value) {
    if (!this.#formats.has(name)) this.#formats.set(name, make());
    return this.#formats.get(name).format(value);
  }
}
