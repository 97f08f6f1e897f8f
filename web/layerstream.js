// Registers the live view with ComfyUI: tabs, node lines, badge, settings, commands. The only file that knows ComfyUI.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { Actions } from "./actions.js";
import { addLine, isStreamingNode } from "./node_line.js";
import { Panel } from "./panel.js";
import { Store } from "./store.js";
import { Words } from "./words.js";

const NAME = "layerstream.main";
const EVENT = "layerstream.state";
const SIDEBAR_TAB = "layerstream";
const BOTTOM_TAB = "layerstream-bottom";
const SETTING = {
  rate: "LayerStream.UpdateRate",
  units: "LayerStream.Units",
  badge: "LayerStream.Badge",
  tab: "LayerStream.DefaultTab",
  language: "LayerStream.Language",
};
const AS_COMFYUI = "comfyui";

const setting = (id) => app.extensionManager?.setting.get(id);
const words = new Words(() => setting(SETTING.units));
const send = (path, options) => api.fetchApi(path, options);
const store = new Store(async () => {
  const response = await send("/layerstream/state");
  if (!response.ok) throw new Error(`the server answered with status ${response.status}`);
  return response.json();
});
const actions = new Actions({ store, words, send });
const preferences = { updatesPerSecond: () => Number(setting(SETTING.rate)) || 4 };

// Made when first shown, since their texts and styles are read when they are made.
const panels = new Map();
let styles = "";

function show(place, host) {
  if (!panels.has(place)) panels.set(place, new Panel({ place, store, words, actions, preferences, styles }));
  panels.get(place).show(host);
}

async function tell(work) {
  try {
    app.extensionManager.toast.add({ severity: "success", summary: "LayerStream", detail: await work(), life: 4000 });
  } catch (error) {
    const detail = words.text("done.failed", { reason: error.message });
    app.extensionManager.toast.add({ severity: "warn", summary: "LayerStream", detail, life: 8000 });
  }
}

function togglePanel() {
  const command = setting(SETTING.tab) === "bottom"
    ? `Workspace.ToggleBottomPanelTab.${BOTTOM_TAB}`
    : `Workspace.ToggleSidebarTab.${SIDEBAR_TAB}`;
  return app.extensionManager.command.execute(command);
}

// The badge is a button of the action bar: ComfyUI draws `topbarBadges` on its cloud only. It watches neither, so the text
// of the button that it made is what changes.
function updateBadge() {
  const button = document.querySelector(".ls-badge");
  const label = button?.querySelector("span");
  if (!label) return;
  button.style.display = setting(SETTING.badge) ? "" : "none";
  const card = store.models().some((model) => model.loaded) ? store.now.card : null;
  const text = card ? `${words.size(card.total_bytes - card.free_bytes)} / ${words.size(card.total_bytes)}` : "LayerStream";
  if (label.textContent !== text) label.textContent = text;
}

async function loadStyles() {
  const response = await fetch(new URL("./layerstream.css", import.meta.url));
  styles = response.ok ? await response.text() : "";
}

async function loadWords() {
  const response = await send("/i18n");
  const chosen = setting(SETTING.language);
  const language = chosen && chosen !== AS_COMFYUI ? chosen : setting("Comfy.Locale");
  words.use(response.ok ? await response.json() : {}, language ?? "en");
}

app.registerExtension({
  name: NAME,
  actionBarButtons: [
    { icon: "pi pi-chart-bar", label: "LayerStream", class: "ls-badge", tooltip: "LayerStream", onClick: togglePanel },
  ],
  settings: [
    {
      id: SETTING.language,
      category: ["LayerStream", "Live view", "Language"],
      name: "Language of the live view",
      tooltip: "Takes effect when the page is loaded again.",
      type: "combo",
      options: [
        { text: "as ComfyUI", value: AS_COMFYUI },
        { text: "English", value: "en" },
        { text: "Deutsch", value: "de" },
        { text: "中文", value: "zh" },
        { text: "日本語", value: "ja" },
      ],
      defaultValue: AS_COMFYUI,
    },
    {
      id: SETTING.tab,
      category: ["LayerStream", "Live view", "DefaultTab"],
      name: "Where the shortcut opens the live view",
      tooltip: "In the side bar, or in the panel below.",
      type: "combo",
      options: [{ text: "side bar", value: "sidebar" }, { text: "panel below", value: "bottom" }],
      defaultValue: "sidebar",
    },
    {
      id: SETTING.badge,
      category: ["LayerStream", "Live view", "Badge"],
      name: "Show the badge in the top bar",
      tooltip: "Memory of the card in use, while a model streams.",
      type: "boolean",
      defaultValue: true,
      onChange: () => requestAnimationFrame(updateBadge), // it is set only afterwards
    },
    {
      id: SETTING.units,
      category: ["LayerStream", "Live view", "Units"],
      name: "Units",
      tooltip: "GiB counts 1024, GB counts 1000.",
      type: "combo",
      options: ["GiB", "GB"],
      defaultValue: "GiB",
    },
    {
      id: SETTING.rate,
      category: ["LayerStream", "Live view", "UpdateRate"],
      name: "Live view: updates a second",
      tooltip: "How often the panel is drawn while something runs.",
      type: "combo",
      options: ["4", "2", "1"],
      defaultValue: "4",
    },
  ],
  commands: [
    { id: "LayerStream.TogglePanel", label: "LayerStream: open or close the live view", icon: "pi pi-chart-bar", function: togglePanel },
    { id: "LayerStream.Free", label: "LayerStream: free the card now", icon: "pi pi-eject", function: () => tell(() => actions.free()) },
    { id: "LayerStream.CopyReport", label: "LayerStream: copy the report", icon: "pi pi-copy", function: () => tell(() => actions.copyReport("text")) },
  ],
  keybindings: [{ combo: { key: "l", alt: true }, commandId: "LayerStream.TogglePanel" }],
  bottomPanelTabs: [
    { id: BOTTOM_TAB, title: "LayerStream", type: "custom", render: (host) => show("bottom", host) },
  ],
  nodeCreated(node) {
    if (isStreamingNode(node)) addLine(node, store, words);
  },
  afterConfigureGraph() {
    store.tell(); // nodes have their names only now
  },
  async setup() {
    api.addEventListener(EVENT, ({ detail }) => store.take(detail));
    api.addEventListener("reconnecting", () => store.lose());
    api.addEventListener("reconnected", () => store.load());
    store.addEventListener("change", updateBadge);
    await Promise.all([loadWords(), loadStyles()]);
    app.extensionManager.registerSidebarTab({
      id: SIDEBAR_TAB,
      icon: "pi pi-chart-bar",
      title: "LayerStream",
      tooltip: "LayerStream",
      type: "custom",
      render: (host) => show("sidebar", host),
    });
    await store.load();
  },
});
