// The key of the user. It lives in this tab only: sessionStorage ends with it, and no other site
// can read it. It is sent as a header, never in an address.

const NAME = "crma-key";

/** The key that requests are sent with; "" if there is none. */
export function storedKey() {
  return sessionStorage.getItem(NAME) ?? "";
}

/** Send this key from now on; "" sends none. */
export function storeKey(key) {
  if (key) sessionStorage.setItem(NAME, key);
  else sessionStorage.removeItem(NAME);
}
