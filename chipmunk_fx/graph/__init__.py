"""From Dynamo's graph to a plan: capture, pattern language, matching, geometry, plan, rewrite."""
