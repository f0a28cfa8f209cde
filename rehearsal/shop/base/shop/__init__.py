"""The shop: a small web application with a queue, deployed as releases."""
