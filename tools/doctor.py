import click


@click.command("doctor")
def command():
    """(being written)"""
