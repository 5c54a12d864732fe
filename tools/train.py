import click


@click.command("train")
def command():
    """(being written)"""
