"""A page to chat with an exported model, which shows the experts of every token.

``page.py`` and ``server_page.py`` need gradio, an extra of the package; the others do not.
"""
