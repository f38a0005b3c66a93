// Templates in place of JSX: html`<p class="x">${text}</p>`. A text is never read as HTML.

import htm from "htm";
import { h } from "preact";

export const html = htm.bind(h);
