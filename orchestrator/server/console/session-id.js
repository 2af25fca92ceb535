const ACCEPTED = /^[A-Za-z0-9_.:-]{1,128}$/;

/** Whether the server takes `text` as a session id. */
export function isSessionId(text) {
  return ACCEPTED.test(text);
}

/** A random UUID, version 4; `crypto.randomUUID` is missing where a page came through plain http. */
export function newSessionId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}
