// Sentences and figures in the person's language.

import assert from "node:assert/strict";
import { test } from "node:test";
import { script } from "./script.mjs";

const { Words } = await script("words.js");

const GIB = 1024 ** 3;
const TRANSLATIONS = {
  en: { layerstream: { done: { freed: "{size} freed", copied: "Copied" }, note: "{count} of {total}" } },
  de: { layerstream: { done: { freed: "{size} frei" } } },
  fr: { another: { done: { freed: "libre" } } },
};

function words(language, unit = "GiB") {
  const made = new Words(() => unit);
  made.use(TRANSLATIONS, language);
  return made;
}

test("a language is taken with its region left off, English where there is none", () => {
  assert.deepEqual(["de", "de-AT", "en", "fr", "xx"].map((name) => words(name).language), ["de", "de", "en", "en", "en"]);
});

test("what a language lacks is said in English, what English lacks by its path", () => {
  assert.equal(words("de").text("done.freed", { size: "1 GiB" }), "1 GiB frei");
  assert.equal(words("de").text("done.copied"), "Copied");
  assert.equal(words("de").text("done.nothing.there"), "done.nothing.there");
});

test("figures stand where they are named, and a name without one stays", () => {
  assert.equal(words("en").text("note", { count: 1234.5678 }), "1,234.57 of {total}");
  assert.equal(words("de").text("note", { count: 1234.5678, total: 0 }), "1.234,57 of 0");
});

test("sizes are in the unit that is set", () => {
  assert.equal(words("en").size(1.5 * GIB), "1.50 GiB");
  assert.equal(words("de").size(1.5 * GIB), "1,50 GiB");
  assert.equal(words("en", "GB").size(1.5 * GIB), "1.61 GB");
  assert.equal(words("en", "furlongs").size(GIB), "1.00 GiB");
  assert.equal(words("en").rate(2 * GIB), "2.00 GiB/s");
});

test("what was not measured is a dash and no number", () => {
  const { size, rate, milliseconds } = Words.prototype;
  for (const say of [size, rate, milliseconds]) assert.equal(say.call(words("en"), null), "–");
  assert.equal(words("en").size(NaN), "–");
  assert.equal(words("en").rate(NaN), "–");
  assert.equal(words("en").size(0), "0.00 GiB");
  assert.equal(words("en").milliseconds(0), "0 ms");
});

test("milliseconds have a digit more where they are few", () => {
  assert.equal(words("en").milliseconds(12.345), "12.3 ms");
  assert.equal(words("en").milliseconds(123.45), "123 ms");
});
