// What the browser knows of the server: columns of figures, what is read again and when, how fast passes go.

import assert from "node:assert/strict";
import { test } from "node:test";
import { script } from "./script.mjs";

const { Store } = await script("store.js");

const CAPACITY = 2400;
const COLUMNS = ["time_s", "free_bytes"];

function session(figures = {}) {
  return { id: 1, version: 1, passes: 0, moved_bytes: 0, in_run: true, ...figures };
}

function moment(time_s, figures = {}, card = { free_bytes: time_s }) {
  return { time_s, card, run: null, sessions: [session(figures)] };
}

function state(now, rows = [], sessions = [{ id: 1, name: "Flux" }]) {
  return { now, sessions, advice: ["fits", {}], happened: [], history: { columns: COLUMNS, rows } };
}

// A store of a server that answers with `answers` in turn, and how often it was asked.
function storeOf(...answers) {
  const asked = { count: 0 };
  const store = new Store(async () => {
    asked.count += 1;
    const answer = answers[Math.min(asked.count, answers.length) - 1];
    if (answer instanceof Error) throw answer;
    return answer;
  });
  return { store, asked };
}

test("a column has the newest moments in order, however many came", async () => {
  const { store } = storeOf(state(moment(0)));
  await store.load();
  for (let index = 0; index < 3 * CAPACITY + 7; index += 1) store.take(moment(index / 4));
  const [times, free] = [store.column("time_s"), store.column("free_bytes")];
  assert.equal(store.length, CAPACITY);
  assert.equal(times[CAPACITY - 1], (3 * CAPACITY + 6) / 4);
  for (let index = 1; index < CAPACITY; index += 1) assert.equal(times[index] - times[index - 1], 0.25);
  assert.deepEqual(free, times);
});

test("what a moment lacks is a gap", async () => {
  const { store } = storeOf(state(moment(0)));
  await store.load();
  store.take(moment(1, {}, null));
  assert.ok(Number.isNaN(store.column("free_bytes")[0]));
  assert.ok(Number.isNaN(store.column("budget_bytes")[0]));
  assert.equal(store.column("time_s")[0], 1);
});

test("the rate is that of a second, and none is told across a gap", async () => {
  const { store } = storeOf(state(moment(0)));
  await store.load();
  for (const [time, moved] of [[0, 0], [0.5, 300], [1, 400], [1.5, 900], [9, 950], [9.5, 1000]]) {
    store.take(moment(time, { moved_bytes: moved }));
  }
  assert.deepEqual([...store.column("link_rate")], [NaN, 600, 400, 600, NaN, 100]);
});

test("the server's history takes the place of what was known, an empty one does not", async () => {
  const { store } = storeOf(state(moment(3), [[1, 10], [2, null]]), state(moment(3)));
  store.take(moment(0));
  await store.load();
  assert.deepEqual([...store.column("time_s")], [1, 2]);
  assert.deepEqual([...store.column("free_bytes")], [10, NaN]);
  await store.load();
  assert.equal(store.length, 2);
});

test("a model is what was read of it, with what the last moment says", async () => {
  const { store } = storeOf(state(moment(0, { passes: 1 }), [], [{ id: 1, name: "Flux", passes: 0 }]));
  await store.load();
  store.take(moment(1, { passes: 5 }));
  assert.equal(store.models()[0].name, "Flux");
  assert.equal(store.models()[0].passes, 5);
});

test("more is read when there is more to read, once for all who ask meanwhile", async () => {
  const { store, asked } = storeOf(state(moment(0)), state(moment(1, { version: 2 })));
  await Promise.all([store.load(), store.load(), store.load()]);
  assert.equal(asked.count, 2);
  const read = new Promise((resolve) => store.addEventListener("change", resolve, { once: true }));
  store.take(moment(2, { version: 2 }));
  await read;
  assert.equal(asked.count, 2);
  store.take(moment(3, { version: 3 }));
  assert.equal(asked.count, 3);
});

test("a server that does not answer is away until it says something", async () => {
  const { store } = storeOf(new Error("no answer"));
  await store.load();
  assert.equal(store.isConnected, false);
  store.take({ ...moment(1), run: { prompt: "x" } });
  assert.equal(store.isConnected, true);
  assert.equal(store.isRunning, true);
  store.lose();
  assert.equal(store.isRunning, false);
});

test("the pace of passes is that of this run", async () => {
  const { store } = storeOf(state(moment(0)));
  await store.load();
  store.take(moment(10, { passes: 1 }));
  assert.equal(store.secondsPerPass(1), null);
  store.take(moment(14, { passes: 3 }));
  store.take(moment(15, { passes: 3 }));
  assert.equal(store.secondsPerPass(1), 2);
  store.take(moment(20, { passes: 3, in_run: false }));
  store.take(moment(30, { passes: 4 }));
  assert.equal(store.secondsPerPass(1), null);
  store.take(moment(31, { passes: 6 }));
  assert.equal(store.secondsPerPass(1), 0.5);
});
