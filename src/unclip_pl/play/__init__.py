"""``unclip play``: a page in the browser. What it draws stands apart from how it looks, which alone needs Gradio."""
