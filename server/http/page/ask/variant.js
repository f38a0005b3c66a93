// The four variants of a question, as an ablation names them.

export const VARIANTS = ["base", "crma", "task", "task+crma"];

/** The fields `task` and `crma` of a request for a variant. */
export function selectionOf(variant, task) {
  return { task: variant.startsWith("task") ? task : null, crma: variant.endsWith("crma") };
}
