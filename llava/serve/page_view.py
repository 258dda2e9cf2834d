"""Viewer of the web page: HTML, style, and the script for zoom, pan, invert and keys."""

from __future__ import annotations

from html import escape

from llava.serve.page_chat import PageChat

NOTICE = (
    "For research use only. Answers may be wrong. Not a medical device; not for clinical decisions. "
    "Images and text stay on this server."
)

STYLE = """
.llava-frame {position: relative; overflow: hidden; height: 420px; max-width: 100%; background: #000;
  touch-action: none; border-radius: 6px; outline-offset: 2px}
.llava-frame img {width: 100%; height: 100%; object-fit: contain; transform-origin: center; cursor: grab;
  transform: translate(var(--llava-x, 0px), var(--llava-y, 0px)) scale(var(--llava-zoom, 1));
  filter: invert(var(--llava-invert, 0))}
.llava-tools {display: flex; flex-wrap: wrap; gap: 6px; margin-top: 6px}
.llava-tools button {padding: 4px 12px; border: 1px solid currentColor; border-radius: 6px}
.llava-empty {padding: 24px 12px; text-align: center; opacity: 0.8}
gradio-app, body {overflow-x: hidden}
@media (max-width: 640px) {.llava-frame {height: 280px}}
"""

SCRIPT = """
<script>
(() => {
  const view = {zoom: 1, x: 0, y: 0, invert: 0};
  const show = () => {
    const style = document.documentElement.style;
    style.setProperty('--llava-zoom', view.zoom);
    style.setProperty('--llava-x', view.x + 'px');
    style.setProperty('--llava-y', view.y + 'px');
    style.setProperty('--llava-invert', view.invert);
  };
  const zoom = (factor) => { view.zoom = Math.min(16, Math.max(0.25, view.zoom * factor)); show(); };
  const pan = (x, y) => { view.x += x; view.y += y; show(); };
  const actions = {
    'zoom-in': () => zoom(1.25), 'zoom-out': () => zoom(0.8),
    'invert': () => { view.invert = 1 - view.invert; show(); },
    'reset': () => { Object.assign(view, {zoom: 1, x: 0, y: 0, invert: 0}); show(); },
  };
  const keys = {'+': 'zoom-in', '=': 'zoom-in', '-': 'zoom-out', 'i': 'invert', '0': 'reset'};
  const arrows = {ArrowLeft: [20, 0], ArrowRight: [-20, 0], ArrowUp: [0, 20], ArrowDown: [0, -20]};
  let held = null;
  document.addEventListener('click', (event) => {
    const name = event.target.dataset && event.target.dataset.llava;
    if (name) { actions[name](); event.preventDefault(); }
  });
  document.addEventListener('wheel', (event) => {
    if (event.target.closest('.llava-frame')) { zoom(event.deltaY < 0 ? 1.1 : 0.9); event.preventDefault(); }
  }, {passive: false});
  document.addEventListener('pointerdown', (event) => {
    if (event.target.closest('.llava-frame')) { held = [event.clientX, event.clientY]; event.preventDefault(); }
  });
  document.addEventListener('pointermove', (event) => {
    if (held) { pan(event.clientX - held[0], event.clientY - held[1]); held = [event.clientX, event.clientY]; }
  });
  document.addEventListener('pointerup', () => { held = null; });
  document.addEventListener('keydown', (event) => {
    if (event.key === 'Escape') {
      const stop = document.querySelector('#llava-stop');
      if (stop) (stop.querySelector('button') || stop).click();
    } else if (event.target.closest && event.target.closest('.llava-frame')) {
      if (keys[event.key]) { actions[keys[event.key]](); event.preventDefault(); }
      if (arrows[event.key]) { pan(...arrows[event.key]); event.preventDefault(); }
    }
  });
})();
</script>
"""

TOOLS = (("zoom-in", "Zoom in"), ("zoom-out", "Zoom out"), ("invert", "Invert"), ("reset", "Reset view"))


def viewer_html(chat: PageChat) -> str:
    """Return the viewer with the selected image."""
    image = chat.current
    if image is None:
        return '<div class="llava-empty">Add an image: click, drop or paste it into the field for the question.</div>'
    buttons = "".join(f'<button type="button" data-llava="{name}">{label}</button>' for name, label in TOOLS)
    description = f"{image.name}{', ' + image.caption if image.caption else ''}"
    return (
        f'<div class="llava-frame" tabindex="0" role="application" '
        f'aria-label="Image viewer: arrows move, plus and minus zoom, i inverts, 0 resets">'
        f'<img src="{image.data_url()}" alt="{escape(description, quote=True)}" draggable="false"></div>'
        f'<div class="llava-tools" role="toolbar" aria-label="Viewer">{buttons}</div>'
    )
