"""Networks that judge images: LPIPS and Inception."""
