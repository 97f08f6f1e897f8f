// The line on a node that says what its model does. A DOM widget, since only those live in both of ComfyUI's renderers.

import { element } from "./elements.js";

const STREAMING = new Set(["LayerStreamModel", "LayerStreamClip", "LayerStreamOffloadPolicy"]);
const HEIGHT_PX = 24;
const MARGIN_PX = 4;
const STYLE = `
  overflow: hidden;
  padding-inline: 10px;
  color: var(--descrip-text, #999);
  font-size: 11px;
  line-height: 16px;
  text-overflow: ellipsis;
  white-space: nowrap;
`;

// True for the nodes that have a model streamed.
export function isStreamingNode(node) {
  return STREAMING.has(node.comfyClass);
}

// Adds the line to `node` and keeps it up to date as long as the node is in a graph.
export function addLine(node, store, words) {
  const text = element("div", { class: "ls-node-line", role: "status", style: STYLE });
  const widget = node.addDOMWidget("layerstream_live", "layerstream-live", text, {
    serialize: false,
    hideOnZoom: true,
    margin: MARGIN_PX,
    getValue: () => "",
    setValue: () => {},
    getMinHeight: () => HEIGHT_PX,
    getMaxHeight: () => HEIGHT_PX,
  });
  widget.serialize = false; // nor in the saved workflow
  const update = () => {
    const line = describe(node, store, words);
    if (text.textContent === line) return;
    text.textContent = line;
    text.title = line; // narrow nodes cut it off
  };
  store.addEventListener("change", update);
  const removed = node.onRemoved;
  node.onRemoved = function onRemoved(...args) {
    store.removeEventListener("change", update);
    return removed?.apply(this, args);
  };
  update();
}

function describe(node, store, words) {
  const model = store.models().find(({ nodes }) => nodes.includes(String(node.id)));
  if (!model) return words.text("node.waiting");
  if (!model.loaded) return words.text("node.idle");
  const seconds = store.secondsPerPass(model.id);
  return words.text("node.line", {
    resident: words.size(model.resident_bytes),
    streamed: words.size(model.streamed_bytes_per_step),
    rate: seconds === null ? "–" : words.text("node.pass", { seconds: words.seconds(seconds) }),
  });
}
