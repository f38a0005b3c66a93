// The frame of the page: which tab is open, which key is used, whether the server is ready.
//
// A tab is named by the address after #: #/ask, #/ablation, #/ablation/abl-… . Its modules are
// loaded when it is first opened.

import { render } from "preact";
import { useCallback, useEffect, useState } from "preact/hooks";

import { get, KEY_NEEDED } from "./api.js";
import { html } from "./html.js";
import { storedKey } from "./key.js";
import { KeyForm } from "./key_form.js";
import { Problem } from "./problem.js";
import { useResource } from "./resource.js";

const TABS = {
  ask: { name: "Ask", load: async () => (await import("./ask/ask.js")).Ask },
  ablation: {
    name: "Ablation",
    load: async () => (await import("./ablation/ablation.js")).Ablation,
  },
  adapters: {
    name: "Adapters",
    load: async () => (await import("./adapters/adapters.js")).Adapters,
  },
  training: {
    name: "Training",
    load: async () => (await import("./training/training.js")).Training,
  },
  live: { name: "Live", load: async () => (await import("./live/live.js")).Live },
};
const FIRST = "ask";
const CHECK_MS = 15_000;

function App() {
  const [name, argument] = useRoute();
  const [round, setRound] = useState(0); // a new key: everything is read again
  const [keyIsNeeded, setKeyIsNeeded] = useState(false);
  const [keyIsOpen, setKeyIsOpen] = useState(false);
  const adapters = useResource((signal) => get("adapters", signal), [round]);
  useEffect(() => {
    const ask = () => setKeyIsNeeded(true);
    window.addEventListener(KEY_NEEDED, ask);
    return () => window.removeEventListener(KEY_NEEDED, ask);
  }, []);
  const onKey = useCallback(() => {
    setKeyIsNeeded(false);
    setKeyIsOpen(false);
    setRound((number) => number + 1);
  }, []);
  return html`
    <a class="skip" href="#main" onClick=${skip}>Skip to the content</a>
    <header>
      <h1>CRMA Server</h1>
      <${Status} model=${adapters.value?.base.name} />
      <button type="button" class="quiet small" aria-expanded=${keyIsOpen || keyIsNeeded}
        onClick=${() => setKeyIsOpen(!keyIsOpen)}>${storedKey() ? "Key set" : "Key"}</button>
    </header>
    <nav aria-label="Tabs">
      ${Object.entries(TABS).map(
        ([key, tab]) => html`
          <a href="#/${key}" data-name=${tab.name}
            aria-current=${key === name ? "page" : null}>${tab.name}</a>
        `,
      )}
    </nav>
    <main id="main" tabindex="-1">
      ${(keyIsNeeded || keyIsOpen) && html`<${KeyForm} isNeeded=${keyIsNeeded} onChange=${onKey} />`}
      ${!keyIsNeeded && html`<${Problem} error=${adapters.error} />`}
      <${Tab} key=${`${name} ${round}`} name=${name} argument=${argument} adapters=${adapters} />
    </main>
  `;
}

/** The open tab, once its modules are there. */
function Tab({ name, argument, adapters }) {
  const tab = useResource(TABS[name].load, [name]);
  const View = tab.value;
  useEffect(() => {
    document.title = `${TABS[name].name} · CRMA Server`;
  }, [name]);
  if (tab.error) return html`<${Problem} error=${tab.error} />`;
  if (!View) return html`<p class="hint">Loading…</p>`;
  return html`<${View} argument=${argument} adapters=${adapters} />`;
}

/** [tab, what follows it] of the address. */
function useRoute() {
  const [route, setRoute] = useState(readRoute);
  useEffect(() => {
    const follow = () => {
      setRoute(readRoute());
      scrollTo(0, 0);
    };
    window.addEventListener("hashchange", follow);
    return () => window.removeEventListener("hashchange", follow);
  }, []);
  return route;
}

function readRoute() {
  const [, name, ...rest] = location.hash.split("/");
  return [Object.hasOwn(TABS, name ?? "") ? name : FIRST, rest.join("/")];
}

function skip(event) {
  event.preventDefault(); // the address names the tab
  document.getElementById("main").focus();
}

/** Whether the server is ready, and which model it serves. */
function Status({ model }) {
  const [problem, setProblem] = useState("");
  useEffect(() => {
    const check = async () => setProblem(await notReady());
    check();
    const timer = setInterval(check, CHECK_MS);
    return () => clearInterval(timer);
  }, []);
  return html`
    <p class="status ${problem ? "bad" : "good"}" role="status" title=${problem || model}>
      ${problem || html`<span class="dot" aria-hidden="true"></span>${model ?? "ready"}`}
    </p>
  `;
}

async function notReady() {
  try {
    await get("readyz");
    return "";
  } catch (error) {
    return error.status === 503 ? "not ready yet" : error.message;
  }
}

render(html`<${App} />`, document.getElementById("app"));
