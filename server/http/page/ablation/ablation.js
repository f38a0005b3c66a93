// The tab Ablation: a new one, past ones, and one of them.

import { get } from "../api.js";
import { html } from "../html.js";
import { Problem } from "../problem.js";
import { useResource } from "../resource.js";
import { AblationForm } from "./form.js";
import { PastRuns } from "./past_runs.js";
import { Run } from "./run.js";

/** The tab; `argument` is the id of a run, or "". */
export function Ablation({ argument: id }) {
  const sets = useResource((signal) => get("question_sets", signal));
  const runs = useResource((signal) => get("ablation", signal), [id]);
  const open = (started) => {
    location.hash = `#/ablation/${started}`;
  };
  if (id) {
    return html`
      <div class="row"><h2>Ablation</h2><a href="#/ablation">New, and past runs</a></div>
      <${Run} key=${id} id=${id} onStarted=${open} />
    `;
  }
  return html`
    <h2>Ablation</h2>
    <p class="hint">The same questions under several variants, compared question by question.</p>
    <${Problem} error=${sets.error} />
    <div class="ablation">
      <${AblationForm} sets=${sets.value ?? []} onSetsChange=${sets.reload} onStarted=${open} />
      <${PastRuns} runs=${runs.value} error=${runs.error} />
    </div>
  `;
}
