module rebalancer.test/heads

go 1.26.0
