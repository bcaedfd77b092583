"""MMEB-V2: 78 tasks over images, videos and visual documents, with and without reasoning, from local folders."""
