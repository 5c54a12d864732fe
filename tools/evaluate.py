import click


@click.command("evaluate")
def command():
    """(being written)"""
