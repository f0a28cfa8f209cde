-- migrate:up
CREATE INDEX orders_by_customer ON orders (customer, created_at DESC);

-- migrate:down
DROP INDEX orders_by_customer;
