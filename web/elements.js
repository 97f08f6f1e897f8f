// Small pieces of the page, made without markup: texts go in as texts.

// An element with attributes (`on...` are listeners) and children.
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// A part of the view under a heading.
export function section(title, classes, ...children) {
  return element("section", { class: `ls-section ${classes}`, "aria-label": title }, element("h3", {}, title), ...children);
}

// A list of named figures out of [key, name, colour variable]: `put(key, text)` writes one.
export function figures(rows) {
  const values = new Map();
  const root = element("dl", { class: "ls-figures" });
  for (const [key, name, variable] of rows) {
    const value = element("dd", { "data-figure": key });
    const term = element("dt", {}, name);
    if (variable) term.prepend(element("span", { class: "ls-swatch", style: `--swatch: var(${variable})`, "aria-hidden": "true" }));
    values.set(key, value);
    root.append(element("div", {}, term, value));
  }
  return {
    root,
    put(key, text) {
      const value = values.get(key);
      if (value.textContent !== text) value.textContent = text;
    },
  };
}
