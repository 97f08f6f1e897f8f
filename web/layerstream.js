// The browser side of LayerStream: registers the extension, nothing more yet.

import { app } from "../../scripts/app.js";

app.registerExtension({ name: "layerstream.main" });
