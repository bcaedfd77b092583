"""The page that a server shows at `/`, to try it by hand."""
