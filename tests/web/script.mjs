// Imports a script of `web/` that imports nothing itself. By its text: without a package beside it, node would not take a
// file that ends in .js for a module.

import { readFileSync } from "node:fs";

export function script(name) {
  const text = readFileSync(new URL(`../../web/${name}`, import.meta.url), "utf8");
  return import(`data:text/javascript,${encodeURIComponent(text)}`);
}
