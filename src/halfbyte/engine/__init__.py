"""Run requests: scheduler, block allocator, paged cache, sampler, asyncio service."""
