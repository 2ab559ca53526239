"""A small real text-to-image model, its world of scenes, prompt sets and a judge, all in one package."""
