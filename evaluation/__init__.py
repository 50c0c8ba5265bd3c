"""What reuse changes and what it saves: quality, speed, two backends side by side, and a request as a page."""
