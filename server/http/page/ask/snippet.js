// The request of an answer, as a line for a shell and as Python.

import { addressOf } from "../api.js";
import { CopyButton } from "../copy.js";
import { html } from "../html.js";
import { storedKey } from "../key.js";

const OF_THE_PAGE = new Set(["stream", "logprobs", "top_logprobs"]); // they do not change the text

/** A request without what the page adds for itself. */
export function plainBody(body) {
  const entries = Object.entries(body).filter(([name]) => !OF_THE_PAGE.has(name));
  return Object.fromEntries(entries);
}

/** The request for curl. A key is named, never shown. */
export function asCurl(body) {
  const quoted = JSON.stringify(plainBody(body)).replaceAll("'", "'\\''");
  const key = storedKey() ? ` \\\n  -H "Authorization: Bearer $CRMA_KEY"` : "";
  const json = " \\\n  -H 'Content-Type: application/json'";
  return `curl -s ${addressOf("generate")}${json}${key} \\\n  -d '${quoted}'`;
}

/** The request for crma_client. */
export function asPython(body) {
  const { prompt, ...options } = plainBody(body);
  const given = Object.entries(options).map(([name, value]) => `, ${name}=${literal(value)}`);
  const key = storedKey() ? ', api_key=os.environ["CRMA_KEY"]' : "";
  const lines = [
    "from crma_client import Client",
    "",
    `with Client(${literal(addressOf("").replace(/\/$/, ""))}${key}) as client:`,
    `    answer = client.generate(${literal(prompt)}${given.join("")})`,
    "print(answer.text)",
  ];
  return (storedKey() ? ["import os", "", ...lines] : lines).join("\n");
}

function literal(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  return JSON.stringify(value);
}

/** Both, to copy. */
export function Snippets({ body }) {
  const texts = [
    ["curl", asCurl(body)],
    ["Python", asPython(body)],
  ];
  return html`
    <details class="snippets">
      <summary>As curl or Python</summary>
      ${texts.map(
        ([name, text]) => html`
          <div class="snippet">
            <div class="row"><h4>${name}</h4><${CopyButton} text=${text} label="Copy as ${name}" /></div>
            <pre tabindex="0" aria-label="The request as ${name}">${text}</pre>
          </div>
        `,
      )}
    </details>
  `;
}
