// Charts of figures over time, on a canvas: stacked areas, and a line. They know no ComfyUI and keep nothing but where
// they drew what, so that a pointer can be asked about.

const LEAST_SPAN_S = 30;
const GAP_S = 2;
const LABEL_PX = 14;

export class TimeChart {
  #canvas;
  #size = { width: 0, height: 0 };
  #times = new Float64Array(0);
  #begin = 0;
  #scale = 1;

  constructor(canvas) {
    this.#canvas = canvas;
  }

  // Reads how large the canvas is, before it is drawn on.
  measure() {
    this.#size = { width: this.#canvas.clientWidth, height: this.#canvas.clientHeight };
  }

  // Draws `layers` ({values, color}) one on the other, or as lines where `isStacked` is false, from 0 to `most`;
  // `references` ({values or value, color, dash}) as lines over them, `breaches` (values, true where) marked at the top.
  draw({ times, layers, most, isStacked = true, references = [], breaches = null, cursor = null, labels, colors }) {
    const { width, height } = this.#size;
    const context = prepare(this.#canvas, this.#size);
    const floor = height - LABEL_PX;
    this.#times = times;
    const last = times.length ? times[times.length - 1] : 0;
    const span = Math.max(LEAST_SPAN_S, times.length ? last - times[0] : 0);
    this.#begin = last - span;
    this.#scale = width / span;
    const y = (value) => floor - (Math.min(value, most) / most) * (floor - 2);

    const runs = this.#runs(width);
    const below = isStacked && most > 0 ? new Float64Array(times.length) : null;
    for (const { values, color } of most > 0 ? layers : []) {
      for (const run of runs) (isStacked ? area : line)(context, this.#points(run), values, below, y, color);
      if (below) for (const index of runs.flat()) below[index] += values[index] || 0;
    }
    for (const { values, value, color, dash } of most > 0 ? references : []) {
      context.setLineDash(dash ?? []);
      if (values) for (const run of runs) line(context, this.#points(run), values, null, y, color);
      else stroke(context, [[0, y(value)], [width, y(value)]], color);
      context.setLineDash([]);
    }
    if (breaches) {
      context.fillStyle = colors.alarm;
      for (const index of runs.flat()) if (breaches(index)) context.fillRect(this.#x(index) - 1, 0, 3, 4);
    }
    if (cursor !== null && cursor < times.length) {
      stroke(context, [[this.#x(cursor), 0], [this.#x(cursor), floor]], colors.text);
    }
    context.fillStyle = colors.border;
    context.fillRect(0, floor, width, 1);
    write(context, labels, width, height, colors);
    return span;
  }

  // The index of the moment nearest to `x` pixels from the left; null where there is none.
  at(x) {
    if (!this.#times.length) return null;
    const wanted = this.#begin + x / this.#scale;
    let [low, high] = [0, this.#times.length - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#times[middle] < wanted) low = middle + 1;
      else high = middle;
    }
    return low > 0 && wanted - this.#times[low - 1] < this.#times[low] - wanted ? low - 1 : low;
  }

  #x(index) {
    return (this.#times[index] - this.#begin) * this.#scale;
  }

  #points(run) {
    return run.map((index) => [this.#x(index), index]);
  }

  // The moments to draw, in runs without gaps, one a pixel at most.
  #runs(width) {
    const runs = [];
    let run = [];
    let column = -1;
    for (let index = 0; index < this.#times.length; index += 1) {
      if (run.length && this.#times[index] - this.#times[index - 1] > GAP_S) {
        runs.push(run);
        run = [];
        column = -1;
      }
      const here = Math.min(width, Math.floor(this.#x(index)));
      if (here === column) run[run.length - 1] = index;
      else run.push(index);
      column = here;
    }
    if (run.length) runs.push(run);
    return runs;
  }
}

// Fits a canvas to its size in the page's pixels, empties it and gives its context.
export function prepare(canvas, { width, height }) {
  const ratio = window.devicePixelRatio || 1;
  const [across, down] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== across || canvas.height !== down) [canvas.width, canvas.height] = [across, down];
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

function area(context, points, values, below, y, color) {
  context.beginPath();
  for (const [x, index] of points) context.lineTo(x, y(below[index] + (values[index] || 0)));
  for (let place = points.length - 1; place >= 0; place -= 1) context.lineTo(points[place][0], y(below[points[place][1]]));
  context.closePath();
  context.fillStyle = color;
  context.fill();
}

function line(context, points, values, below, y, color) {
  let piece = [];
  for (const [x, index] of points) {
    if (Number.isNaN(values[index])) {
      stroke(context, piece, color);
      piece = [];
    } else piece.push([x, y(values[index])]);
  }
  stroke(context, piece, color);
}

function stroke(context, points, color) {
  context.beginPath();
  for (const [x, y] of points) context.lineTo(x, y);
  context.strokeStyle = color;
  context.lineWidth = 1.5;
  context.stroke();
}

function write(context, { top, left, right }, width, height, colors) {
  context.font = `11px ${colors.font}`;
  context.fillStyle = colors.quiet;
  context.textBaseline = "bottom";
  context.textAlign = "left";
  context.fillText(left, 0, height);
  context.textAlign = "right";
  context.fillText(right, width, height);
  context.textBaseline = "top";
  context.fillStyle = colors.text;
  context.fillText(top, width - 3, 3);
}
