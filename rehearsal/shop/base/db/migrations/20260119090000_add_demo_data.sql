-- migrate:up
INSERT INTO customers (name, password) VALUES
    ('anna', 'pbkdf2_sha256$1000$salt-anna$30134dc4616cf99e3ce2a302d290fc023523c83bc5f3ff032a9ab850e9da3c98'),
    ('bela', 'pbkdf2_sha256$1000$salt-bela$6cdf4951437871cd730d1c1286a2948f138b56d5f34ad24aa1a7770052f91c73'),
    ('chiara', 'pbkdf2_sha256$1000$salt-chiara$bab1d58744d088380351d634fad3e7201d49565bace045eaf93a6a39aebe146d'),
    ('dmitri', 'pbkdf2_sha256$1000$salt-dmitri$36fce3bb03d0c5fd3654cd6bc83efb8a844fcb24d20405694181f0dc203893a4'),
    ('elif', 'pbkdf2_sha256$1000$salt-elif$b0eb16a46bede770056f156051b88992cd7a761e0fcb9b04626bb77f69f711de'),
    ('farid', 'pbkdf2_sha256$1000$salt-farid$b3af669a6b6435e1f7491c2e6ae4b015adc4da3e8ad4a69be1e81935687a6d06'),
    ('smoke', 'pbkdf2_sha256$1000$salt-smoke$ef75adf659f899d6085c2b7882a6d22efa747d703edbc63a44973f1c87377eb8');
INSERT INTO products (name, price_cents, picture) VALUES
    ('Apron', 437, 'apron.jpg'),
    ('Basket', 848, 'basket.jpg'),
    ('Candle', 1533, 'candle.jpg'),
    ('Desk lamp', 2492, 'desk-lamp.jpg'),
    ('Egg timer', 3725, 'egg-timer.jpg'),
    ('Flask', 532, 'flask.jpg'),
    ('Garden hose', 2313, 'garden-hose.jpg'),
    ('Hammer', 4368, 'hammer.jpg'),
    ('Ink', 1997, 'ink.jpg'),
    ('Jug', 4600, 'jug.jpg'),
    ('Kettle', 2777, 'kettle.jpg'),
    ('Ladle', 1228, 'ladle.jpg'),
    ('Mug', 4653, 'mug.jpg'),
    ('Notebook', 3652, 'notebook.jpg'),
    ('Oven glove', 2925, 'oven-glove.jpg'),
    ('Pan', 2472, 'pan.jpg'),
    ('Quilt', 2293, NULL),
    ('Rake', 2388, 'rake.jpg'),
    ('Scissors', 2757, 'scissors.jpg'),
    ('Teapot', 3400, 'teapot.jpg'),
    ('Umbrella', 4317, 'umbrella.jpg'),
    ('Vase', 808, 'vase.jpg'),
    ('Watering can', 2273, 'watering-can.jpg'),
    ('Yarn', 4012, 'yarn.jpg');
-- Last winter's orders, the same in every copy: a backup needs something worth comparing.
INSERT INTO orders (customer, product_id, quantity, amount_cents, status, created_at, processed_at)
SELECT customers.name, products.id, quantity, quantity * products.price_cents, 'processed', placed, placed + '1 second'
FROM generate_series(1, 5000) AS n
CROSS JOIN LATERAL (SELECT 1 + n * 7 % 4 AS quantity, timestamptz '2026-01-19 09:00+00' - n * interval '11 minutes' AS placed) AS made
JOIN customers ON customers.id = 1 + n * 13 % 6
JOIN products ON products.id = 1 + n * 17 % 24
ORDER BY n;

-- migrate:down
DELETE FROM jobs;
DELETE FROM orders;
DELETE FROM products;
DELETE FROM customers;
