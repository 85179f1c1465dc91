"""Makes docs/example_app.png: the example app after an answer, in a virtual display. Needs Xvfb, tkinter and Pillow.

python scripts/screenshot_app.py [FILE]
"""

from __future__ import annotations

import sys
import time
import tkinter as tk
from pathlib import Path

from PIL import ImageGrab

from scripts.example_app import ChatWindow
from scripts.example_worker import Worker
from tests.support.display import display

FILE = Path(__file__).resolve().parent.parent / "docs" / "example_app.png"
QUESTIONS = ("What is a drafter?", "Tell me a short story about a fox.")


def main() -> None:
    """Asks the embedded pair and saves a picture of the window."""
    with display():
        root = tk.Tk()
        root.geometry("640x460+0+0")
        window = ChatWindow(root, Worker())
        for question in QUESTIONS:
            wait(window)
            window.entry.insert("end", question)
            window.send()
        wait(window)
        root.update()
        # A palette: the picture has few colours, and takes less room so.
        picture = ImageGrab.grab((0, 0, root.winfo_width(), root.winfo_height())).quantize(64)
        picture.save(sys.argv[1] if sys.argv[1:] else FILE, optimize=True)
        window.close()


def wait(window: ChatWindow) -> None:
    """Lets the window run until it is ready for a message."""
    while window.busy:
        window.root.update()
        time.sleep(0.01)


if __name__ == "__main__":
    main()
