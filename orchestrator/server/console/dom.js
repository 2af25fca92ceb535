/** A new element with classes and children. Strings become text nodes, never markup. */
export function element(tag, classes, ...children) {
  const node = document.createElement(tag);
  if (classes) node.className = classes;
  node.append(...children);
  return node;
}

/** What a server's field holds as one line of text; anything but text, numbers and truth values is shown as JSON. */
export function asText(value) {
  if (value === null || value === undefined) return "";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** Whether the user still looks at the end of a scrolling box. */
export function atEnd(box) {
  return box.scrollHeight - box.scrollTop - box.clientHeight < 80;
}
