// Publishes a PEFT LoRA from its files.

import { CheckField } from "../field.js";
import { html } from "../html.js";
import { Problem } from "../problem.js";
import { useAct } from "./acts.js";

/** The form; it serves at once. */
export function Upload({ onDone }) {
  const { act, isBusy, error, done } = useAct(onDone);
  const upload = (event) => {
    event.preventDefault();
    const form = new FormData(event.target);
    for (const name of ["licence", "prompt_format"]) if (!form.get(name)) form.delete(name);
    act("POST", "adapters", "Upload", { content: form });
  };
  return html`
    <form class="card upload" onSubmit=${upload} aria-labelledby="upload-heading">
      <h3 id="upload-heading">Upload a LoRA</h3>
      <p class="hint">PEFT's adapter_config.json and adapter_model.safetensors, and the tokenizer's files if it has a
        chat template of its own. It becomes the next version of the task and serves at once.</p>
      <div class="pair">
        <label>Task <input name="name" type="text" required pattern="[a-z0-9][a-z0-9._\\-]{0,63}" /></label>
        <label>Licence <input name="licence" type="text" placeholder="unknown" /></label>
      </div>
      <label>Files <input name="files" type="file" multiple required /></label>
      <label>Prompt format
        <select name="prompt_format"><option value="">as found</option>
          <option>raw</option><option>chat</option><option>template</option></select>
      </label>
      <${CheckField} name="trust_base" value="true"
        label="Its config names this base model by another name" />
      <div class="row"><button class="main" disabled=${isBusy}>Upload</button>
        <span class="hint" role="status">${isBusy ? "uploading" : done && "published"}</span></div>
      <${Problem} error=${error} />
    </form>
  `;
}
