"""`python -m mmemb_deploy`, which is `mmemb`: what torchrun starts."""

from mmemb_deploy.cli.main import main

main()
