// Requests to the server that this page came from, with the user's key.

import { storedKey } from "./key.js";
import { serverEvents } from "./server_events.js";

export const KEY_NEEDED = "crma-key-needed";
export const UNREACHABLE = "The server cannot be reached. Is it still running?";
export const CUT_OFF = "The connection ended before the answer did.";

/** What the server refused, in its own words; `status` 0: there was no answer. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, field = null, allowed = null } = {}) {
    super(message);
    Object.assign(this, { status, code, field, allowed });
  }
}

/** The address of a route, below the one of this page. */
export function addressOf(path) {
  return new URL(path, document.baseURI).href;
}

/**
 * Send a request and return its response. `body` is sent as JSON, `content` as it is.
 * Throws ApiError, or AbortError if `signal` says so.
 */
export async function send(method, path, { body, content, type, signal } = {}) {
  const headers = {};
  const key = storedKey();
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (type) headers["Content-Type"] = type;
  const sent = body === undefined ? content : JSON.stringify(body);
  const response = await reached(
    fetch(addressOf(path), { method, headers, body: sent, signal }),
    UNREACHABLE,
  );
  if (!response.ok) throw await refusal(response);
  return response;
}

/** The JSON of a GET. Throws as `send`. */
export async function get(path, signal) {
  return (await send("GET", path, { signal })).json();
}

/** Yields {event, data} of a stream of server-sent events. Throws as `send`, also in mid-stream. */
export async function* stream(method, path, options) {
  const response = await send(method, path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const events = serverEvents();
  for (;;) {
    const { done, value } = await reached(reader.read(), CUT_OFF);
    if (done) return;
    yield* events.read(value);
  }
}

/** Wait for the network; its own errors differ by browser and say nothing. */
async function reached(promise, message) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(message);
  }
}

async function refusal(response) {
  if (response.status === 401) window.dispatchEvent(new Event(KEY_NEEDED));
  let error;
  try {
    error = (await response.json()).error;
  } catch {
    return new ApiError(`${response.status} ${response.statusText}`, { status: response.status });
  }
  const wait = response.headers.get("Retry-After");
  const advice = wait ? ` Try again in ${wait} s.` : "";
  return new ApiError(error.message + advice, { status: response.status, ...error });
}
