"""From a digest to a verified artifact: caches, the breaker of a source, retries.

What is here may wait and may fail, so that no forward imports it. The source itself is a port;
no socket is opened here. The door is ``enhanced_kernel_cache``.
"""
