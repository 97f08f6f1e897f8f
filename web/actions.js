// What the buttons and commands do. Each promises a sentence that says what came of it, and throws with the reason.

const COLUMNS = [
  "time_s",
  "total_bytes",
  "resident_bytes",
  "ring_bytes",
  "activation_bytes",
  "other_model_bytes",
  "other_program_bytes",
  "free_bytes",
  "budget_bytes",
  "moved_bytes",
  "link_rate",
];

export class Actions {
  // `send(path, options)` asks the server, as ComfyUI's `api.fetchApi` does.
  constructor({ store, words, send }) {
    this.store = store;
    this.words = words;
    this.send = send;
  }

  async free() {
    const response = await this.send("/layerstream/free", { method: "POST", body: "{}" });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    await this.store.load();
    return this.words.text("done.freed", { size: this.words.size(answer.freed_bytes) });
  }

  async copyReport(format) {
    const response = await this.send(`/layerstream/report?format=${format}`);
    if (!response.ok) throw new Error((await response.json()).error);
    const text = format === "json" ? JSON.stringify(await response.json(), null, 1) : await response.text();
    // Pages that come over plain HTTP from another machine have no clipboard.
    if (!navigator.clipboard) return save(text, format === "json" ? "json" : "txt", response.headers.get("content-type"));
    await navigator.clipboard.writeText(text);
    return this.words.text("done.copied");
  }

  async exportRun() {
    return save(this.table(), "csv", "text/csv");
  }

  // The history as lines of comma-separated values; an empty one is a gap.
  table() {
    const columns = COLUMNS.map((name) => this.store.column(name));
    const lines = [COLUMNS.join(",")];
    for (let row = 0; row < this.store.length; row += 1) {
      lines.push(columns.map((column) => (Number.isNaN(column[row]) ? "" : column[row])).join(","));
    }
    return `${lines.join("\n")}\n`;
  }
}

// Has the browser keep `text` as a file; gives the file's name.
function save(text, ending, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = `layerstream-${new Date().toISOString().slice(0, 19).replaceAll(":", "-")}.${ending}`;
  link.click();
  URL.revokeObjectURL(link.href);
  return link.download;
}
