// The walk over a model's blocks as a strip: one cell a block, in the order of the model, in as many rows as it takes.

import { prepare } from "./chart.js";

const LEAST_CELL_PX = 7;
const MOST_CELL_PX = 28;
const ROW_PX = 18;
const SPACE_PX = 1;

export class BlockStrip {
  #canvas;
  #width = 0;
  #count = 0;
  #perRow = 1;
  #cell = LEAST_CELL_PX;

  constructor(canvas) {
    this.#canvas = canvas;
  }

  // Reads how wide the canvas is, before it is drawn on.
  measure() {
    this.#width = this.#canvas.clientWidth;
  }

  // Draws `letters` in `colors` by letter. `base` says how each block is kept, whatever is done with it now.
  draw({ letters, base, selected, slowest, colors }) {
    const height = this.#arrange(letters.length);
    const context = prepare(this.#canvas, { width: this.#width, height });
    for (let index = 0; index < letters.length; index += 1) {
      const [x, y] = this.#place(index);
      const size = this.#cell - SPACE_PX;
      context.fillStyle = colors[base[index]] ?? colors.quiet;
      context.fillRect(x, y, size, ROW_PX - 4);
      // What is done now shows by its form as well as by its colour.
      if (letters[index] === "c") {
        context.fillStyle = colors.c;
        context.fillRect(x, y, size, ROW_PX - 4);
      } else if (letters[index] === "f") {
        context.fillStyle = colors.f;
        context.fillRect(x, y + 4, size, ROW_PX - 12);
      }
      if (index === slowest) {
        context.fillStyle = colors.text;
        context.fillRect(x, y + ROW_PX - 3, size, 2);
      }
      if (index === selected) {
        context.strokeStyle = colors.text;
        context.lineWidth = 2;
        context.strokeRect(x, y, size, ROW_PX - 4);
      }
    }
  }

  // The block at a place of the canvas, null where there is none.
  at(x, y) {
    const column = Math.floor(x / this.#cell);
    const index = Math.floor(y / ROW_PX) * this.#perRow + column;
    return column < this.#perRow && index >= 0 && index < this.#count ? index : null;
  }

  get perRow() {
    return this.#perRow;
  }

  #arrange(count) {
    const width = this.#width;
    this.#count = count;
    const rows = Math.max(1, Math.ceil((count * LEAST_CELL_PX) / Math.max(LEAST_CELL_PX, width)));
    this.#perRow = Math.max(1, Math.ceil(count / rows));
    this.#cell = Math.max(LEAST_CELL_PX, Math.min(MOST_CELL_PX, Math.floor(width / this.#perRow)));
    this.#canvas.style.height = `${rows * ROW_PX}px`;
    return rows * ROW_PX;
  }

  #place(index) {
    return [(index % this.#perRow) * this.#cell, Math.floor(index / this.#perRow) * ROW_PX];
  }
}
