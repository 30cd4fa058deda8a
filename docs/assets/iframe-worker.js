// The search runs in a worker. Browsers refuse workers to pages that are opened as files; there it runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(script) {
      super();
      // Inside the frame `postMessage(message)` answers the page, as in a worker.
      const answer = "const own = postMessage.bind(window);" +
        "postMessage = (message, ...rest) => rest.length ? own(message, ...rest) : parent.postMessage(message, '*');";
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.title = "search";
      this.frame.srcdoc = `<script>${answer}</script><script src="${script}"></script>`;
      this.loaded = new Promise((resolve) => this.frame.addEventListener("load", resolve));
      document.body.append(this.frame);
      window.addEventListener("message", ({ source, data }) => {
        if (source === this.frame.contentWindow) this.dispatchEvent(new MessageEvent("message", { data }));
      });
    }

    postMessage(message) {
      this.loaded.then(() => this.frame.contentWindow.postMessage(message, "*"));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
