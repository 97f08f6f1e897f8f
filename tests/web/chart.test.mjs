// Where charts put moments and values, asked of what they draw.

import assert from "node:assert/strict";
import { test } from "node:test";
import { script } from "./script.mjs";

const { TimeChart } = await script("chart.js");

const [WIDTH, HEIGHT, LABEL] = [300, 100, 14];
const FLOOR = HEIGHT - LABEL;
const LABELS = { top: "", left: "", right: "" };

globalThis.window = { devicePixelRatio: 2 };

// A canvas that notes the points of each path, and its chart with `times` drawn.
function drawn(times, layers, options = {}) {
  const paths = [];
  const context = new Proxy(
    { beginPath: () => paths.push([]), lineTo: (x, y) => paths.at(-1).push([x, y]) },
    { get: (known, name) => known[name] ?? (() => {}), set: () => true },
  );
  const canvas = { clientWidth: WIDTH, clientHeight: HEIGHT, width: 0, height: 0, getContext: () => context };
  const chart = new TimeChart(canvas);
  chart.measure();
  const span = chart.draw({ times: Float64Array.from(times), layers, most: 10, labels: LABELS, colors: {}, ...options });
  return { chart, canvas, paths, span };
}

const line = (values, times, options) => drawn(times, [{ values, color: "" }], { isStacked: false, ...options });

test("a canvas has as many pixels as the screen", () => {
  const { canvas } = line([1], [0]);
  assert.deepEqual([canvas.width, canvas.height], [2 * WIDTH, 2 * HEIGHT]);
});

test("the last moment is at the right, and no less than half a minute is shown", () => {
  assert.equal(line([1], [0]).span, 30);
  const { paths, span } = line([0, 10], [98, 100]);
  assert.equal(span, 30);
  assert.deepEqual(paths[0], [[WIDTH - 20, FLOOR], [WIDTH, 2]]);
});

test("values beyond the scale end at its top", () => {
  assert.deepEqual(line([5, 25], [98, 100]).paths[0], [[WIDTH - 20, FLOOR - (FLOOR - 2) / 2], [WIDTH, 2]]);
});

test("neither moments that lie apart nor values that lack are joined", () => {
  assert.deepEqual(line([1, 1, 1, 1], [90, 91, 99, 100]).paths.map((path) => path.length), [2, 2]);
  assert.deepEqual(line([1, 1, NaN, 1], [97, 98, 99, 100]).paths.map((path) => path.length), [2, 1]);
});

test("layers lie one on the other", () => {
  const { paths } = drawn([99, 100], [{ values: [2, 4] }, { values: [3, 3] }]);
  const heights = (path) => path.map(([, y]) => Math.round(((FLOOR - y) / (FLOOR - 2)) * 10));
  assert.deepEqual(heights(paths[0]), [2, 4, 0, 0]);
  assert.deepEqual(heights(paths[1]), [5, 7, 4, 2]);
});

test("ten minutes take a point a pixel at most", () => {
  const times = Array.from({ length: 2400 }, (_, index) => index / 4);
  const [path] = line(times.map(() => 1), times).paths;
  assert.ok(path.length > WIDTH - 2 && path.length <= WIDTH + 1, `${path.length} points`);
});

test("a place on the chart is the moment nearest to it", () => {
  const { chart } = line([1, 1, 1], [70, 90, 100]);
  assert.deepEqual([-5, 0, 99, 101, 240, 260, 300, 999].map((x) => chart.at(x)), [0, 0, 0, 1, 1, 2, 2, 2]);
  assert.equal(line([], []).chart.at(10), null);
});
