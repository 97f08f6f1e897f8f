// What is known of the server: the last moment, its history in typed arrays, and more of each model. One EventTarget;
// whoever draws listens to "change". It knows the server's messages and nothing of ComfyUI or of what is drawn.

export const PARTS = ["resident", "ring", "activation", "other_model", "other_program", "free"];

const COLUMNS = ["time_s", "total_bytes", ...PARTS.map((part) => `${part}_bytes`), "budget_bytes", "moved_bytes"];
const CAPACITY = 2400; // ten minutes at four moments a second
const GAP_S = 2; // moments further apart than this are of different runs
const RATE_OVER_S = 1;
const HAPPENINGS = 200;
const PASSES_TIMED = 24;

export class Store extends EventTarget {
  now = null;
  sessions = new Map();
  advice = ["nothing", {}];
  happened = [];
  isConnected = true;

  #fetchState;
  #columns = {};
  #first = 0;
  #end = 0;
  #versions = new Map();
  #paces = new Map();
  #isLoading = false;
  #isStale = false;

  // `fetchState()` promises what `GET /layerstream/state` gives.
  constructor(fetchState) {
    super();
    this.#fetchState = fetchState;
    // Twice the room, so that a column is one piece of memory and is moved down only once in so many moments.
    for (const name of [...COLUMNS, "link_rate"]) this.#columns[name] = new Float64Array(2 * CAPACITY);
  }

  get length() {
    return this.#end - this.#first;
  }

  // The values of a column, oldest first; NaN is a gap.
  column(name) {
    return this.#columns[name].subarray(this.#first, this.#end);
  }

  get isRunning() {
    return this.isConnected && Boolean(this.now?.run);
  }

  // Takes a message of the server's.
  take(moment) {
    this.isConnected = true;
    this.#note(moment);
    this.#push({ time_s: moment.time_s, moved_bytes: sum(moment.sessions, "moved_bytes"), ...(moment.card ?? {}) });
    this.happened = [...this.happened, ...(moment.happened ?? [])].slice(-HAPPENINGS);
    if (moment.sessions.some(({ id, version }) => this.#versions.get(id) !== version)) this.load();
    this.tell();
  }

  // Reads everything anew: at the start, after a lost connection, and when a plan or a timed pass is new.
  async load() {
    this.#isStale = true;
    if (this.#isLoading) return;
    this.#isLoading = true;
    try {
      while (this.#isStale) {
        this.#isStale = false;
        this.#read(await this.#fetchState());
      }
    } catch {
      this.isConnected = false; // the next message, or the connection's return, says otherwise
    } finally {
      this.#isLoading = false;
    }
    this.tell();
  }

  lose() {
    this.isConnected = false;
    this.tell();
  }

  // The models that stream, with what the last moment says of each over what was read of it.
  models() {
    return (this.now?.sessions ?? []).map((moment) => ({ ...this.sessions.get(moment.id), ...moment }));
  }

  // Seconds that passes of a model take, by when they were counted; null until two were.
  secondsPerPass(id) {
    const pace = this.#paces.get(id) ?? [];
    if (pace.length < 2) return null;
    const [first, last] = [pace[0], pace[pace.length - 1]];
    return (last.time - first.time) / (last.passes - first.passes);
  }

  #read(state) {
    this.isConnected = true;
    this.sessions = new Map(state.sessions.map((session) => [session.id, session]));
    this.#versions = new Map(state.now.sessions.map(({ id, version }) => [id, version]));
    this.advice = state.advice;
    this.happened = state.happened;
    // A server that was started anew has none, and what was seen before stays in sight.
    const { columns, rows } = state.history;
    if (rows.length > 0) this.#first = this.#end = 0;
    for (const row of rows) this.#push(Object.fromEntries(columns.map((name, index) => [name, row[index]])));
    this.#note(state.now);
  }

  #note(moment) {
    const before = new Map(this.now?.sessions.map((session) => [session.id, session]));
    this.now = moment;
    for (const { id, passes, in_run: isInRun } of moment.sessions) {
      const last = before.get(id);
      if (!last || (isInRun && !last.in_run) || passes < last.passes) this.#paces.set(id, []);
      const pace = this.#paces.get(id) ?? [];
      const known = pace[pace.length - 1];
      if (isInRun && passes > 0 && passes !== known?.passes) {
        this.#paces.set(id, [...pace, { time: moment.time_s, passes }].slice(-PASSES_TIMED));
      }
    }
  }

  #push(figures) {
    if (this.#end === 2 * CAPACITY) {
      for (const column of Object.values(this.#columns)) column.copyWithin(0, this.#end - CAPACITY + 1, this.#end);
      this.#end = CAPACITY - 1;
      this.#first = 0;
    }
    for (const name of COLUMNS) this.#columns[name][this.#end] = figures[name] ?? NaN;
    this.#columns.link_rate[this.#end] = this.#rateAt(this.#end);
    this.#end += 1;
    this.#first = Math.max(this.#first, this.#end - CAPACITY);
  }

  // Bytes a second that began to cross the link in the second before: copies are started in bursts.
  #rateAt(index) {
    const { time_s: times, moved_bytes: moved } = this.#columns;
    let from = index;
    while (from > this.#first && times[from] - times[from - 1] < GAP_S && times[index] - times[from] < RATE_OVER_S) {
      from -= 1;
    }
    if (from === index) return NaN;
    return Math.max(0, (moved[index] - moved[from]) / (times[index] - times[from]));
  }

  // Has everything that is drawn from here be looked at anew.
  tell() {
    this.dispatchEvent(new Event("change"));
  }
}

function sum(sessions, key) {
  return sessions.reduce((total, session) => total + session[key], 0);
}
