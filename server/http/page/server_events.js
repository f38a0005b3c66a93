// Server-sent events, wherever the network cuts them.

/** A reader: `read(piece)` returns the events {event, data} that are complete by now. */
export function serverEvents() {
  let rest = "";
  return {
    read(piece) {
      const blocks = (rest + piece).split("\n\n");
      rest = blocks.pop();
      return blocks.map(readBlock);
    },
  };
}

function readBlock(block) {
  const fields = {};
  for (const line of block.split("\n")) {
    const at = line.indexOf(": ");
    if (at > 0) fields[line.slice(0, at)] = line.slice(at + 2);
  }
  return { event: fields.event ?? "message", data: JSON.parse(fields.data) };
}
