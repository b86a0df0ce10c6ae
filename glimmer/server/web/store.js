/**
 * Conversations in this browser: one IndexedDB store, one record a conversation. Other tabs hear of each change.
 * Knows nothing of what a conversation holds but its `id`.
 */

const channel = new BroadcastChannel("glimmer");
let opened = null;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("glimmer", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function run(mode, work) {
  const transaction = (await database()).transaction("conversations", mode);
  const request = work(transaction.objectStore("conversations"));
  if (mode === "readwrite") transaction.commit(); // at once: the page may be closing
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

export const all = () => run("readonly", (store) => store.getAll());

export async function put(conversation) {
  await run("readwrite", (store) => store.put(conversation));
  channel.postMessage({ id: conversation.id });
}

export async function remove(id) {
  await run("readwrite", (store) => store.delete(id));
  channel.postMessage({ id });
}

/** Calls `listener(id, conversation)` when another tab has changed a conversation; null when it has deleted it. */
export function onOtherTab(listener) {
  channel.onmessage = async ({ data }) => {
    const conversation = await run("readonly", (store) => store.get(data.id));
    listener(data.id, conversation ?? null);
  };
}
